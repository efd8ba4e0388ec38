package dev.rlhf.example;

import com.google.rpc.BadRequest;
import dev.rlhf.reward.v1.GetRewardInfoRequest;
import dev.rlhf.reward.v1.GetRewardInfoResponse;
import dev.rlhf.reward.v1.RewardServiceGrpc;
import dev.rlhf.reward.v1.Sample;
import dev.rlhf.reward.v1.SampleResult;
import dev.rlhf.reward.v1.Scope;
import dev.rlhf.reward.v1.ScoreRequest;
import dev.rlhf.reward.v1.ScoreResponse;
import io.grpc.Context;
import io.grpc.Contexts;
import io.grpc.StatusRuntimeException;
import io.grpc.stub.StreamObserver;
import java.util.Set;
import java.util.function.Supplier;
import java.util.logging.Level;
import java.util.logging.Logger;

/** RewardService with one reward, under its name and as the default. */
final class RewardService extends RewardServiceGrpc.RewardServiceImplBase {
  static final int MAX_REQUEST_BYTES = 4 * 1024 * 1024;
  static final int MAX_CONCURRENT_CALLS = 64;

  private static final int MAX_SAMPLES = 256;
  private static final int REMEMBERED_SAMPLES = 65_536;
  private static final Logger LOG = Logger.getLogger(RewardService.class.getName());

  /** A sample's name: ids are unique within a run only. */
  private record Key(String runId, String sampleId) {}

  // Only what is final may be remembered: a PENDING sample is judged again each time that it comes.
  private record Judged(String content, SampleResult result) {}

  private final Reward reward;
  private final Memory<Key, Judged> memory = new Memory<>(REMEMBERED_SAMPLES);

  RewardService(Reward reward) {
    this.reward = reward;
  }

  @Override
  public void score(ScoreRequest request, StreamObserver<ScoreResponse> observer) {
    answer(observer, () -> score(request));
  }

  @Override
  public void getRewardInfo(GetRewardInfoRequest request, StreamObserver<GetRewardInfoResponse> observer) {
    answer(observer, () -> describe(request.getReward()));
  }

  private ScoreResponse score(ScoreRequest request) {
    BadRequest violations = Validation.violations(request, MAX_SAMPLES);
    if (violations.getFieldViolationsCount() > 0) {
      throw Failures.invalidFields(violations);
    }
    checkName(request.getReward());
    Set<String> jsonKeys = Set.copyOf(request.getJsonMetadataKeysList());
    ScoreResponse.Builder response = ScoreResponse.newBuilder();
    for (Sample sample : request.getSamplesList()) {
      // At the deadline, too: the library cancels the context then.
      if (Context.current().isCancelled()) {
        throw Contexts.statusFromCancelled(Context.current()).asRuntimeException();
      }
      response.addResults(judge(request.getRunId(), sample, jsonKeys));
    }
    return response.build();
  }

  private SampleResult judge(String runId, Sample sample, Set<String> jsonKeys) {
    Key key = new Key(runId, sample.getSampleId());
    String content = Samples.fingerprint(sample, jsonKeys);
    Judged judged = memory.get(key);
    if (judged == null) {
      judged = memory.keep(key, new Judged(content, Samples.judge(sample, jsonKeys, reward)));
    }
    return judged.content.equals(content)
        ? judged.result
        : Samples.failed(sample, "SAMPLE_ID_CLASH", "this sample_id came with other content before");
  }

  private static GetRewardInfoResponse describe(String name) {
    checkName(name);
    return GetRewardInfoResponse.newBuilder()
        .setName(AnswerReward.NAME)
        .setVersion(AnswerReward.VERSION)
        .setMaxSamples(MAX_SAMPLES)
        .setMaxRequestBytes(MAX_REQUEST_BYTES)
        .setMaxConcurrentCalls(MAX_CONCURRENT_CALLS)
        .setScope(Scope.SCOPE_SAMPLE)
        .addRequiredMetadata(AnswerReward.COLUMN)
        .build();
  }

  private static void checkName(String name) {
    if (!name.isEmpty() && !name.equals(AnswerReward.NAME)) {
      throw Failures.unknownReward(name, AnswerReward.NAME);
    }
  }

  /** Runs a handler. An exception that it let through would reach the client as UNKNOWN, whatever it says. */
  private static <T> void answer(StreamObserver<T> observer, Supplier<T> handler) {
    T response;
    try {
      response = handler.get();
    } catch (StatusRuntimeException failure) {
      observer.onError(failure);
      return;
    } catch (RuntimeException fault) {
      LOG.log(Level.SEVERE, "a call failed", fault);
      observer.onError(Failures.internal());
      return;
    }
    observer.onNext(response);
    observer.onCompleted();
  }
}
