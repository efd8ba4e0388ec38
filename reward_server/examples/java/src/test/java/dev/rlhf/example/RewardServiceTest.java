package dev.rlhf.example;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;

import com.google.rpc.BadRequest;
import com.google.rpc.BadRequest.FieldViolation;
import com.google.rpc.ErrorInfo;
import dev.rlhf.reward.v1.GetRewardInfoRequest;
import dev.rlhf.reward.v1.GetRewardInfoResponse;
import dev.rlhf.reward.v1.RewardServiceGrpc;
import dev.rlhf.reward.v1.Sample;
import dev.rlhf.reward.v1.SampleResult;
import dev.rlhf.reward.v1.Scope;
import dev.rlhf.reward.v1.ScoreRequest;
import dev.rlhf.reward.v1.ScoreResponse;
import io.grpc.Context;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Server;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.netty.shaded.io.grpc.netty.NettyChannelBuilder;
import io.grpc.netty.shaded.io.grpc.netty.NettyServerBuilder;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.StreamObserver;
import java.net.InetSocketAddress;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.logging.Level;
import java.util.logging.Logger;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.function.Executable;

class RewardServiceTest {
  private Server server;
  private ManagedChannel channel;
  private RewardServiceGrpc.RewardServiceBlockingStub stub;

  @BeforeEach
  void start() throws Exception {
    Reward answer = new AnswerReward();
    Reward faulty =
        (completion, reference) -> {
          if (completion.equals("fault")) {
            throw new IllegalStateException("a secret of the server");
          }
          return answer.judge(completion, reference);
        };
    server =
        NettyServerBuilder.forAddress(new InetSocketAddress("127.0.0.1", 0))
            .addService(new RewardService(faulty))
            .build()
            .start();
    channel =
        NettyChannelBuilder.forTarget("127.0.0.1:" + server.getPort(), InsecureChannelCredentials.create()).build();
    stub = RewardServiceGrpc.newBlockingStub(channel);
  }

  @AfterEach
  void stop() throws Exception {
    channel.shutdownNow();
    server.shutdownNow().awaitTermination();
  }

  private static Sample sample(String id, String completion) {
    return Sample.newBuilder()
        .setSampleId(id)
        .setGroupId("g")
        .setCompletion(completion)
        .putMetadata("answer", "42")
        .build();
  }

  private static ScoreRequest request(String runId, Sample... samples) {
    return ScoreRequest.newBuilder().setRunId(runId).addAllSamples(List.of(samples)).build();
  }

  /** What the call's error says: its code, its reason, and the paths of the wrong fields. */
  private record Failure(Status.Code code, String message, String reason, List<String> paths) {
    static Failure of(Executable call) throws Exception {
      StatusRuntimeException error = assertThrows(StatusRuntimeException.class, call);
      var details = StatusProto.fromThrowable(error).getDetailsList();
      ErrorInfo info = details.get(0).unpack(ErrorInfo.class);
      assertEquals("rlhf-services", info.getDomain());
      List<String> paths = new ArrayList<>();
      for (var detail : details.subList(1, details.size())) {
        for (FieldViolation violation : detail.unpack(BadRequest.class).getFieldViolationsList()) {
          paths.add(violation.getField());
        }
      }
      return new Failure(error.getStatus().getCode(), error.getMessage(), info.getReason(), paths);
    }
  }

  @Test
  void eachSampleIsAnsweredUnderItsId() {
    Sample without = Sample.newBuilder().setSampleId("c").setGroupId("g").build();
    List<SampleResult> results =
        stub.score(request("r", sample("a", "42."), sample("b", "\ufeff42"), without)).getResultsList();
    assertEquals(List.of("a", "b", "c"), results.stream().map(SampleResult::getSampleId).toList());
    assertEquals(1.25, results.get(0).getScored().getReward());
    assertEquals(0, results.get(1).getScored().getReward(), 0);
    assertEquals("MISSING_METADATA", results.get(2).getFailed().getCode());
  }

  @Test
  void theSameSampleGetsTheSameAnswerAndItsIdWithOtherContentFails() {
    SampleResult first = stub.score(request("r", sample("a", "42"))).getResults(0);
    SampleResult other = stub.score(request("r", sample("a", "43"))).getResults(0);
    assertEquals("SAMPLE_ID_CLASH", other.getFailed().getCode());
    assertEquals(first, stub.score(request("r", sample("a", "42"))).getResults(0));
    assertEquals(0, stub.score(request("another run", sample("a", "43"))).getResults(0).getScored().getReward(), 0);
  }

  @Test
  void theRewardIsDescribedUnderItsNameAndAsTheDefault() {
    GetRewardInfoResponse described = stub.getRewardInfo(GetRewardInfoRequest.newBuilder().setReward("answer").build());
    assertEquals(described, stub.getRewardInfo(GetRewardInfoRequest.getDefaultInstance()));
    assertFalse(described.getVersion().isEmpty());
    assertEquals(
        GetRewardInfoResponse.newBuilder()
            .setName("answer")
            .setVersion(described.getVersion())
            .setMaxSamples(256)
            .setMaxRequestBytes(4194304)
            .setMaxConcurrentCalls(64)
            .setScope(Scope.SCOPE_SAMPLE)
            .addRequiredMetadata("answer")
            .build(),
        described);
  }

  @Test
  void anotherRewardsNameIsNotFound() throws Exception {
    ScoreRequest score = request("r", sample("a", "42")).toBuilder().setReward("other").build();
    GetRewardInfoRequest info = GetRewardInfoRequest.newBuilder().setReward("other").build();
    for (Executable call : List.<Executable>of(() -> stub.score(score), () -> stub.getRewardInfo(info))) {
      Failure failure = Failure.of(call);
      assertEquals(Status.Code.NOT_FOUND, failure.code);
      assertEquals("NOT_FOUND", failure.reason);
      assertEquals(List.of("reward"), failure.paths);
    }
  }

  @Test
  void aMalformedRequestIsRefusedWithThePathsOfItsWrongFields() throws Exception {
    Failure failure = Failure.of(() -> stub.score(request("", sample("a", "42"), sample("a", "42"))));
    assertEquals(Status.Code.INVALID_ARGUMENT, failure.code);
    assertEquals("INVALID_FIELD", failure.reason);
    assertEquals(List.of("run_id", "samples[1].sample_id"), failure.paths);
  }

  @Test
  void aFaultOfTheRewardIsInternalAndKeepsItsCauseToItself() throws Exception {
    Logger log = Logger.getLogger(RewardService.class.getName());
    log.setLevel(Level.OFF);
    try {
      Failure failure = Failure.of(() -> stub.score(request("r", sample("a", "fault"))));
      assertEquals(Status.Code.INTERNAL, failure.code);
      assertEquals("INTERNAL", failure.reason);
      assertEquals(List.of(), failure.paths);
      assertFalse(failure.message.contains("secret"));
    } finally {
      log.setLevel(null);
    }
  }

  @Test
  void aCallWhoseCallerIsGoneStopsBetweenTwoSamples() {
    Context.CancellableContext call = Context.current().withCancellation();
    AtomicInteger judged = new AtomicInteger();
    RewardService service =
        new RewardService(
            (completion, reference) -> {
              if (judged.incrementAndGet() == 2) {
                call.cancel(null);
              }
              return new Reward.Judgement(0, Map.of());
            });
    List<Status.Code> codes = new ArrayList<>();
    StreamObserver<ScoreResponse> observer =
        new StreamObserver<>() {
          @Override
          public void onNext(ScoreResponse response) {}

          @Override
          public void onError(Throwable error) {
            codes.add(Status.fromThrowable(error).getCode());
          }

          @Override
          public void onCompleted() {}
        };
    call.run(() -> service.score(request("r", sample("a", ""), sample("b", ""), sample("c", "")), observer));
    assertEquals(2, judged.get());
    assertEquals(List.of(Status.Code.CANCELLED), codes);
  }
}
