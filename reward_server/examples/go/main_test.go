package main

import (
	"bytes"
	"context"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	pb "example.com/reward/gen/rlhf/reward/v1"
)

const patience = 30 * time.Second

func TestAServerAnnouncesItselfDescribesItselfAndScores(t *testing.T) {
	running := start(t, patience)
	rewards := pb.NewRewardServiceClient(running.channel)
	info, err := rewards.GetRewardInfo(running.ctx, &pb.GetRewardInfoRequest{})
	if err != nil || info.GetName() != rewardName || info.GetMaxSamples() != maxSamples {
		t.Errorf("got %v and %v", info, err)
	}
	response, err := rewards.Score(running.ctx, requestOf(1))
	if err != nil || response.GetResults()[0].GetScored().GetReward() != 1.25 {
		t.Errorf("got %v and %v", response, err)
	}
	if err := running.stop(); err != nil {
		t.Error(err)
	}
	if want := "listening on " + running.channel.Target() + "\n"; running.output.String() != want {
		t.Errorf("it printed %q, want %q", running.output.String(), want)
	}
}

func TestARequestOfMoreBytesThanDeclaredIsRefused(t *testing.T) {
	running := start(t, patience)
	request := requestOf(1)
	request.Samples[0].Prompt = string(make([]byte, maxRequestBytes))
	_, err := pb.NewRewardServiceClient(running.channel).Score(running.ctx, request)
	if status.Code(err) != codes.ResourceExhausted {
		t.Errorf("got %v", err)
	}
}

func TestADrainTellsWatchersAndIsNotHeldUpByThem(t *testing.T) {
	running := start(t, 100*time.Millisecond)
	request := &healthpb.HealthCheckRequest{Service: pb.RewardService_ServiceDesc.ServiceName}
	watch, err := healthpb.NewHealthClient(running.channel).Watch(running.ctx, request)
	if err != nil {
		t.Fatal(err)
	}
	expect := func(want healthpb.HealthCheckResponse_ServingStatus) {
		t.Helper()
		if health, err := watch.Recv(); err != nil || health.GetStatus() != want {
			t.Fatalf("got %v and %v, want %v", health, err, want)
		}
	}
	expect(healthpb.HealthCheckResponse_SERVING)
	ended := make(chan error, 1)
	go func() { ended <- running.stop() }()
	expect(healthpb.HealthCheckResponse_NOT_SERVING)
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-running.ctx.Done():
		t.Error("the server still runs")
	}
}

// running is a server on a port of its own, and a connection to it.
type running struct {
	ctx     context.Context
	channel *grpc.ClientConn
	output  *bytes.Buffer
	// stop does what SIGTERM does, and returns what serve returned.
	stop func() error
}

func start(t *testing.T, grace time.Duration) running {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	channel, err := grpc.NewClient(listener.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	signalled, signal := context.WithCancel(ctx)
	t.Cleanup(func() { channel.Close(); cancel() })
	var output bytes.Buffer
	ended := make(chan error, 1)
	go func() { ended <- serve(signalled, listener, &output, grace) }()
	return running{ctx, channel, &output, func() error { signal(); return <-ended }}
}
