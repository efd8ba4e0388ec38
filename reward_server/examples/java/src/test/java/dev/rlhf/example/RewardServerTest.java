package dev.rlhf.example;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.health.v1.HealthCheckRequest;
import io.grpc.health.v1.HealthCheckResponse;
import io.grpc.health.v1.HealthCheckResponse.ServingStatus;
import io.grpc.health.v1.HealthGrpc;
import io.grpc.netty.shaded.io.grpc.netty.NettyChannelBuilder;
import java.io.IOException;
import java.net.InetAddress;
import java.net.ServerSocket;
import java.nio.file.Path;
import java.util.Iterator;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;

@Timeout(60)
class RewardServerTest {
  private Process process;

  private void start(String listen) throws IOException {
    ProcessBuilder builder =
        new ProcessBuilder(
            Path.of(System.getProperty("java.home"), "bin", "java").toString(),
            "-cp",
            System.getProperty("java.class.path"),
            RewardServer.class.getName());
    builder.environment().put("LISTEN", listen);
    process = builder.redirectError(ProcessBuilder.Redirect.DISCARD).start();
  }

  @AfterEach
  void kill() {
    process.destroyForcibly();
  }

  @Test
  void sigtermTellsThoseWhoWatchTheHealthAndEndsWithStatusZero() throws Exception {
    start("127.0.0.1:0");
    String line = process.inputReader().readLine();
    assertTrue(line.matches("listening on 127\\.0\\.0\\.1:[1-9]\\d*"), line);
    String target = line.substring("listening on ".length());
    ManagedChannel channel = NettyChannelBuilder.forTarget(target, InsecureChannelCredentials.create()).build();
    try {
      HealthCheckRequest service = HealthCheckRequest.newBuilder().setService("rlhf.reward.v1.RewardService").build();
      Iterator<HealthCheckResponse> watch = HealthGrpc.newBlockingStub(channel).watch(service);
      assertEquals(ServingStatus.SERVING, watch.next().getStatus());
      process.destroy(); // SIGTERM
      assertEquals(ServingStatus.NOT_SERVING, watch.next().getStatus());
    } finally {
      channel.shutdownNow();
    }
    assertEquals(0, process.waitFor());
  }

  @Test
  void aPortThatIsTakenIsAnError() throws Exception {
    try (ServerSocket taken = new ServerSocket(0, 1, InetAddress.getLoopbackAddress())) {
      start("127.0.0.1:" + taken.getLocalPort());
      assertEquals(1, process.waitFor());
    }
  }
}
