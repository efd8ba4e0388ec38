"""Who may call what, and over what: TLS, tokens, roles and quotas, all from files that are read again when they change.

docs/security.md tells operators how to use it, SECURITY.md against whom it helps.
"""
