"""Completes a prompt with Generate, and once more with StreamGenerate: python generate.py PROMPT."""

import json
import os
import sys
from pathlib import Path

import grpc

from rlhf.policy.v1 import policy_pb2, policy_pb2_grpc

# Spreads calls over all addresses of the name, and makes a call again that no replica has begun to answer.
SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": "rlhf.policy.v1.PolicyService"}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.2s",
                "maxBackoff": "5s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}


def main() -> None:
    tls = grpc.ssl_channel_credentials(Path(os.environ["CA_FILE"]).read_bytes())
    token = grpc.access_token_call_credentials(Path(os.environ["TOKEN_FILE"]).read_text().strip())
    credentials = grpc.composite_channel_credentials(tls, token)
    seconds = float(os.environ.get("DEADLINE_SECONDS", "60"))
    request = policy_pb2.GenerateRequest(
        prompt=policy_pb2.Prompt(text=sys.argv[1]),
        sampling=policy_pb2.SamplingParams(temperature=0, max_new_tokens=16),
    )
    options = [("grpc.service_config", json.dumps(SERVICE_CONFIG))]
    with grpc.secure_channel(os.environ["TARGET"], credentials, options) as channel:
        policy = policy_pb2_grpc.PolicyServiceStub(channel)
        answer = policy.Generate(request, timeout=seconds)
        print(answer.completions[0].text)
        for message in policy.StreamGenerate(policy_pb2.StreamGenerateRequest(request=request), timeout=seconds):
            print(message.delta.text, end="", flush=True)
        print()


if __name__ == "__main__":
    try:
        main()
    except grpc.RpcError as error:
        sys.exit(f"{error.code().name}: {error.details()}")
