package dev.rlhf.example;

import dev.rlhf.reward.v1.RewardServiceGrpc;
import io.grpc.BindableService;
import io.grpc.Server;
import io.grpc.health.v1.HealthCheckResponse.ServingStatus;
import io.grpc.netty.shaded.io.grpc.netty.NettyServerBuilder;
import io.grpc.protobuf.services.HealthStatusManager;
import io.grpc.protobuf.services.ProtoReflectionService;
import io.grpc.protobuf.services.ProtoReflectionServiceV1;
import java.io.IOException;
import java.net.InetSocketAddress;
import java.net.URI;
import java.util.concurrent.Executors;
import java.util.concurrent.TimeUnit;

/** The process: listen, serve, drain. */
public final class RewardServer {
  private static final long GRACE_SECONDS = 10;

  private RewardServer() {}

  /** Serves at the address in LISTEN until SIGTERM or SIGINT. */
  public static void main(String[] arguments) throws InterruptedException {
    String listen = System.getenv().getOrDefault("LISTEN", "127.0.0.1:50052");
    // A URI knows where the port begins, in "[::1]:50052" too.
    URI address = URI.create("grpc://" + listen);
    HealthStatusManager health = new HealthStatusManager();
    health.setStatus(RewardServiceGrpc.SERVICE_NAME, ServingStatus.SERVING);
    Server server =
        NettyServerBuilder.forAddress(new InetSocketAddress(address.getHost(), address.getPort()))
            // A call holds a thread for as long as it runs, and the default pool has no bound.
            .executor(Executors.newFixedThreadPool(RewardService.MAX_CONCURRENT_CALLS))
            .maxInboundMessageSize(RewardService.MAX_REQUEST_BYTES)
            .addService(new RewardService(new AnswerReward()))
            .addService(health.getHealthService())
            .addService(ProtoReflectionServiceV1.newInstance())
            .addService(reflectionForOlderClients())
            .build();
    try {
      server.start();
    } catch (IOException error) {
      System.err.println("cannot listen on " + listen + ": " + error.getCause());
      System.exit(1);
    }
    Runtime.getRuntime().addShutdownHook(new Thread(() -> drain(server, health)));
    System.out.println("listening on " + address.getHost() + ":" + server.getPort());
    server.awaitTermination();
  }

  private static void drain(Server server, HealthStatusManager health) {
    health.enterTerminalState();
    server.shutdown();
    try {
      // Bounded: an open health Watch never ends by itself.
      server.awaitTermination(GRACE_SECONDS, TimeUnit.SECONDS);
    } catch (InterruptedException interrupted) {
      Thread.currentThread().interrupt();
    }
    server.shutdownNow();
    // The JVM's own status after a signal would be 128 + its number.
    Runtime.getRuntime().halt(0);
  }

  @SuppressWarnings("deprecation")
  private static BindableService reflectionForOlderClients() {
    return ProtoReflectionService.newInstance();
  }
}
