"""A small command-line client, so that anyone can talk to a policy server: python -m policy_server.client --help."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import grpc
from google.protobuf import json_format

from rlhf.channel import open_channel
from rlhf.failures import RpcFailure, from_rpc_error
from rlhf.policy.v1 import policy_pb2, policy_pb2_grpc
from rlhf.security.config import ClientSecurity, ClientTls, CredentialsError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 a refused or failed call, 2 a wrong argument, 130 Ctrl-C."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if (arguments.tls_cert is None) != (arguments.tls_key is None):
        parser.error("--tls-cert and --tls-key go together")
    try:
        asyncio.run(arguments.run(arguments))
    except grpc.RpcError as error:
        print(f"error: {_one_line(from_rpc_error(error))}", file=sys.stderr)
        return 1
    except (ValueError, CredentialsError) as error:  # a number that the field of the message cannot hold, a file
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m policy_server.client", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--target", default="127.0.0.1:50051", help="host:port of the policy server (%(default)s)")
    common.add_argument("--model", default="", help='model name; default: the policy; "reference" is served too')
    common.add_argument("--timeout", type=float, default=600.0, help="deadline in seconds (%(default)s)")
    common.add_argument("--tls", action="store_true", help="use TLS; the next four flags imply it")
    common.add_argument("--tls-ca", type=Path, help="authorities to trust (PEM; default: the public ones)")
    common.add_argument("--tls-cert", type=Path, help="own certificate (PEM), with --tls-key")
    common.add_argument("--tls-key", type=Path, help="its key (PEM)")
    common.add_argument("--tls-name", default="", help="name in the server's certificate")
    common.add_argument("--token-file", type=Path, help="file with the token to send")

    generate = commands.add_parser("generate", parents=[common], help="complete a prompt, streamed to the terminal")
    generate.add_argument("prompt", help="text to complete, or with --chat what the user says")
    generate.add_argument("--chat", action="store_true", help="render the prompt with the model's chat template")
    generate.add_argument("--max-new-tokens", type=int, help="default: the server's")
    generate.add_argument("--temperature", type=float, help="0 = greedy; default 1")
    generate.add_argument("--top-p", type=float, help="nucleus, in (0, 1]; default 1")
    generate.add_argument("--top-k", type=int, help="0 = off (default)")
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop string; may be repeated")
    generate.add_argument("--seed", type=int, help="default: the server picks one")
    generate.add_argument("--n", type=int, help="number of completions; default 1")
    generate.set_defaults(run=_generate)

    model = commands.add_parser("model", parents=[common], help="show what the server serves, as JSON")
    model.set_defaults(run=_model)
    return parser


def _channel(arguments: argparse.Namespace) -> grpc.aio.Channel:
    files = (arguments.tls_ca, arguments.tls_cert, arguments.tls_key, arguments.tls_name)
    tls = ClientTls(*files) if arguments.tls or any(files) else None
    return open_channel(arguments.target, security=ClientSecurity(tls, arguments.token_file))


async def _generate(arguments: argparse.Namespace) -> None:
    request = _request(arguments)
    async with _channel(arguments) as channel:
        stub = policy_pb2_grpc.PolicyServiceStub(channel)  # type: ignore[no-untyped-call]
        if (arguments.n or 1) > 1:
            answer = await stub.Generate(request, timeout=arguments.timeout)
            for completion in answer.completions:
                print(f"--- {completion.index} (seed {completion.seed})\n{completion.text}")
            return
        async for message in stub.StreamGenerate(
            policy_pb2.StreamGenerateRequest(request=request), timeout=arguments.timeout
        ):
            print(message.delta.text, end="", flush=True)
    print()


async def _model(arguments: argparse.Namespace) -> None:
    async with _channel(arguments) as channel:
        stub = policy_pb2_grpc.PolicyServiceStub(channel)  # type: ignore[no-untyped-call]
        answer = await stub.GetModel(policy_pb2.GetModelRequest(model=arguments.model), timeout=arguments.timeout)
    print(
        json_format.MessageToJson(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    )


def _request(arguments: argparse.Namespace) -> policy_pb2.GenerateRequest:
    if arguments.chat:
        turn = policy_pb2.ChatMessage(role="user", parts=[policy_pb2.ContentPart(text=arguments.prompt)])
        prompt = policy_pb2.Prompt(chat=policy_pb2.Chat(messages=[turn]))
    else:
        prompt = policy_pb2.Prompt(text=arguments.prompt)
    # None leaves a field unset, which the contract tells apart from 0.
    sampling = policy_pb2.SamplingParams(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        max_new_tokens=arguments.max_new_tokens,
        stop_strings=arguments.stop,
        seed=arguments.seed,
        n=arguments.n,
    )
    return policy_pb2.GenerateRequest(model=arguments.model, prompt=prompt, sampling=sampling)


def _one_line(failure: RpcFailure) -> str:
    fields = "; ".join(f"{violation.field}: {violation.description}" for violation in failure.violations)
    code = failure.code.name
    return " ".join(f"{code}: {fields or failure.message}".split())


if __name__ == "__main__":
    sys.exit(main())
