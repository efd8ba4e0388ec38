// The reward "answer" as a process that serves reward.proto and nothing else.
package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"

	pb "example.com/reward/gen/rlhf/reward/v1"
)

const (
	defaultAddress = "127.0.0.1:50052"
	// Beyond its reward, a sample costs its two ids and a digest: about 1 KiB, so 64 MiB in all.
	rememberedSamples = 65_536
	grace             = 10 * time.Second
)

func main() {
	ctx, restore := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	// A second signal does what it does everywhere: it ends the process at once.
	context.AfterFunc(ctx, restore)

	listener, err := net.Listen("tcp", cmp.Or(os.Getenv("LISTEN"), defaultAddress))
	if err != nil {
		log.Fatal(err)
	}
	if err := serve(ctx, listener, os.Stdout, grace); err != nil {
		log.Fatal(err)
	}
}

// serve answers calls until the context ends, and then gives those in flight the time of grace to finish.
func serve(ctx context.Context, listener net.Listener, announce io.Writer, grace time.Duration) error {
	rewards, err := newService(rememberedSamples)
	if err != nil {
		return err
	}
	server := grpc.NewServer(grpc.MaxRecvMsgSize(maxRequestBytes))
	pb.RegisterRewardServiceServer(server, rewards)
	reflection.Register(server)

	// "" says that the process is alive and stays SERVING to the end; the service's name says that it judges.
	name := pb.RewardService_ServiceDesc.ServiceName
	healthServer := health.NewServer()
	healthServer.SetServingStatus(name, healthpb.HealthCheckResponse_SERVING)
	healthpb.RegisterHealthServer(server, healthServer)

	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	fmt.Fprintln(announce, "listening on", listener.Addr())
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}

	healthServer.SetServingStatus(name, healthpb.HealthCheckResponse_NOT_SERVING)
	// An open health Watch never ends by itself, so the wait must.
	defer time.AfterFunc(grace, server.Stop).Stop()
	server.GracefulStop()
	return nil
}
