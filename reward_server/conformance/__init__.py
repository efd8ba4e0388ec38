"""The conformance kit: judges any reward server, in any language, by the sentences of reward.proto, over the wire.

It uses nothing of the reward server beside it, so that it judges that one as it judges every other.
"""
