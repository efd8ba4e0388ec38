// RewardService: between the wire and the reward.
#pragma once

#include <grpcpp/grpcpp.h>

#include "memory.h"
#include "rlhf/reward/v1/reward.grpc.pb.h"
#include "sample.h"

namespace example {

inline constexpr int kMaxRequestBytes = 4 << 20;

// Serves the one reward, under its name and as the default.
class RewardService final : public rlhf::reward::v1::RewardService::Service {
 public:
  explicit RewardService(std::size_t remembered_samples) : memory_(remembered_samples) {}

  grpc::Status Score(grpc::ServerContext* context, const rlhf::reward::v1::ScoreRequest* request,
                     rlhf::reward::v1::ScoreResponse* response) override;

  grpc::Status GetRewardInfo(grpc::ServerContext* context, const rlhf::reward::v1::GetRewardInfoRequest* request,
                             rlhf::reward::v1::GetRewardInfoResponse* response) override;

 private:
  // The first answer again where the sample is remembered, a new one otherwise.
  rlhf::reward::v1::SampleResult Answer(const std::string& run_id, const rlhf::reward::v1::Sample& sample,
                                        const JsonKeys& json_keys);

  Memory memory_;
};

// What becomes of a sample that is not remembered.
rlhf::reward::v1::SampleResult Judge(const rlhf::reward::v1::Sample& sample, const JsonKeys& json_keys);

}  // namespace example
