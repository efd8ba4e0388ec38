#include "service.h"

#include <fmt/format.h>
#include <grpcpp/support/error_details.h>

#include <vector>

#include "errors.pb.h"
#include "request.h"
#include "reward.h"

namespace example {
namespace {

using rlhf::reward::v1::Sample;
using rlhf::reward::v1::SampleResult;

constexpr int kMaxConcurrentCalls = 64;

// A status with its google.rpc details, which travel as one binary trailer.
grpc::Status Refusal(grpc::StatusCode code, const std::string& reason, const std::vector<Violation>& wrong) {
  google::rpc::ErrorInfo info;
  info.set_domain("rlhf-services");
  info.set_reason(reason);
  google::rpc::BadRequest bad_request;
  std::string message;
  for (const auto& [field, description] : wrong) {
    auto& violation = *bad_request.add_field_violations();
    violation.set_field(field);
    violation.set_description(description);
    message += fmt::format("{}{}: {}", message.empty() ? "" : "; ", field, description);
  }
  google::rpc::Status status;
  status.set_code(code);
  status.set_message(message);
  status.add_details()->PackFrom(info);
  status.add_details()->PackFrom(bad_request);
  grpc::Status refusal;
  grpc::SetErrorDetails(status, &refusal);
  return refusal;
}

grpc::Status Find(const std::string& reward) {
  if (reward.empty() || reward == kName) return grpc::Status::OK;
  const std::string description = fmt::format("\"{}\" is not here; the only one is \"{}\"", Head(reward), kName);
  return Refusal(grpc::StatusCode::NOT_FOUND, "NOT_FOUND", {{"reward", description}});
}

SampleResult Failed(const Sample& sample, const std::string& code, const std::string& message) {
  SampleResult result;
  result.set_sample_id(sample.sample_id());
  result.mutable_failed()->set_code(code);
  result.mutable_failed()->set_message(message);
  return result;
}

}  // namespace

grpc::Status RewardService::Score(grpc::ServerContext* context, const rlhf::reward::v1::ScoreRequest* request,
                                  rlhf::reward::v1::ScoreResponse* response) {
  if (const auto wrong = Violations(*request); !wrong.empty()) {
    return Refusal(grpc::StatusCode::INVALID_ARGUMENT, "INVALID_FIELD", wrong);
  }
  if (auto found = Find(request->reward()); !found.ok()) return found;
  const JsonKeys json_keys(request->json_metadata_keys().begin(), request->json_metadata_keys().end());
  for (const Sample& sample : request->samples()) {
    // Also true once the deadline has passed: nobody waits for the rest.
    if (context->IsCancelled()) return grpc::Status::CANCELLED;
    *response->add_results() = Answer(request->run_id(), sample, json_keys);
  }
  return grpc::Status::OK;
}

// Must never change while the process lives.
grpc::Status RewardService::GetRewardInfo(grpc::ServerContext*, const rlhf::reward::v1::GetRewardInfoRequest* request,
                                          rlhf::reward::v1::GetRewardInfoResponse* response) {
  if (auto found = Find(request->reward()); !found.ok()) return found;
  response->set_name(std::string(kName));
  response->set_version(std::string(kVersion));
  response->set_max_samples(kMaxSamples);
  response->set_max_request_bytes(kMaxRequestBytes);
  response->set_max_concurrent_calls(kMaxConcurrentCalls);
  response->set_scope(rlhf::reward::v1::SCOPE_SAMPLE);
  response->add_required_metadata(std::string(kRequiredColumn));
  return grpc::Status::OK;
}

SampleResult RewardService::Answer(const std::string& run_id, const Sample& sample, const JsonKeys& json_keys) {
  const SampleKey key{run_id, sample.sample_id()};
  const std::string content = Fingerprint(sample, json_keys);
  auto known = memory_.Recall(key);
  if (!known) known = memory_.Remember(key, {content, Judge(sample, json_keys)});
  if (known->fingerprint != content) {
    return Failed(sample, "SAMPLE_ID_CLASH", "this sample_id came with other content before");
  }
  return std::move(known->result);
}

SampleResult Judge(const Sample& sample, const JsonKeys& json_keys) try {
  Check(sample, json_keys);
  const Reward reward = RewardOf(sample.completion(), ReferenceAnswer(sample, kRequiredColumn, json_keys));
  SampleResult result;
  result.set_sample_id(sample.sample_id());
  auto& scored = *result.mutable_scored();
  scored.set_reward(reward.Value());
  auto& components = *scored.mutable_components();
  components["match"] = reward.match;
  components["format"] = reward.format;
  components["length"] = reward.length;
  return result;
} catch (const Unjudgeable& reason) {
  return Failed(sample, reason.code(), reason.what());
}

}  // namespace example
