// Completes a prompt with Generate, and once more with StreamGenerate: generate PROMPT.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/proto"

	pb "example.com/generate/gen/rlhf/policy/v1"
)

// Spreads calls over all addresses of the name, and makes a call again that no replica has begun to answer.
const serviceConfig = `{
  "loadBalancingConfig": [{"round_robin": {}}],
  "methodConfig": [{
    "name": [{"service": "rlhf.policy.v1.PolicyService"}],
    "retryPolicy": {
      "maxAttempts": 5,
      "initialBackoff": "0.2s",
      "maxBackoff": "5s",
      "backoffMultiplier": 2,
      "retryableStatusCodes": ["UNAVAILABLE"]
    }
  }]
}`

// bearer sends a token with every call, over TLS only.
type bearer string

func (token bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(token)}, nil
}

func (bearer) RequireTransportSecurity() bool { return true }

func main() {
	log.SetFlags(0)
	if err := generate(os.Args[1]); err != nil {
		log.Fatal(err)
	}
}

func generate(prompt string) error {
	tls, err := credentials.NewClientTLSFromFile(os.Getenv("CA_FILE"), "")
	if err != nil {
		return err
	}
	token, err := os.ReadFile(os.Getenv("TOKEN_FILE"))
	if err != nil {
		return err
	}
	deadline, err := time.ParseDuration(cmp.Or(os.Getenv("DEADLINE_SECONDS"), "60") + "s")
	if err != nil {
		return err
	}
	connection, err := grpc.NewClient(
		os.Getenv("TARGET"),
		grpc.WithTransportCredentials(tls),
		grpc.WithPerRPCCredentials(bearer(strings.TrimSpace(string(token)))),
		grpc.WithDefaultServiceConfig(serviceConfig),
	)
	if err != nil {
		return err
	}
	defer connection.Close()
	policy := pb.NewPolicyServiceClient(connection)
	request := &pb.GenerateRequest{
		Prompt:   &pb.Prompt{Kind: &pb.Prompt_Text{Text: prompt}},
		Sampling: &pb.SamplingParams{Temperature: proto.Float32(0), MaxNewTokens: proto.Uint32(16)},
	}

	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	answer, err := policy.Generate(ctx, request)
	if err != nil {
		return err
	}
	fmt.Println(answer.Completions[0].Text)

	ctx, cancel = context.WithTimeout(context.Background(), deadline)
	defer cancel()
	stream, err := policy.StreamGenerate(ctx, &pb.StreamGenerateRequest{Request: request})
	if err != nil {
		return err
	}
	for {
		message, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			fmt.Println()
			return nil
		}
		if err != nil {
			return err
		}
		fmt.Print(message.Delta.Text)
	}
}
