package main

import (
	"context"
	"crypto/sha256"
	"slices"

	lru "github.com/hashicorp/golang-lru/v2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "example.com/reward/gen/rlhf/reward/v1"
)

const (
	maxSamples = 256
	// Kept by gRPC itself, which answers RESOURCE_EXHAUSTED before a larger request comes this far.
	maxRequestBytes    = 4 << 20
	maxConcurrentCalls = 64
)

// service answers the calls of the contract, and remembers what it answered.
type service struct {
	// Answers UNIMPLEMENTED to RPCs that a later contract adds.
	pb.UnimplementedRewardServiceServer
	memory *lru.Cache[sampleKey, settled]
}

// sampleKey names a sample: ids are unique within a run only.
type sampleKey struct{ runID, sampleID string }

// settled is a final outcome, with the digest of the content that it is about.
type settled struct {
	digest [sha256.Size]byte
	result *pb.SampleResult
}

// newService returns a service that remembers the outcomes of so many samples, those asked for most recently.
func newService(remembered int) (*service, error) {
	memory, err := lru.New[sampleKey, settled](remembered)
	return &service{memory: memory}, err
}

func (s *service) GetRewardInfo(
	_ context.Context, request *pb.GetRewardInfoRequest,
) (*pb.GetRewardInfoResponse, error) {
	if err := checkReward(request.GetReward()); err != nil {
		return nil, err
	}
	return &pb.GetRewardInfoResponse{
		Name:               rewardName,
		Version:            rewardVersion,
		MaxSamples:         maxSamples,
		MaxRequestBytes:    maxRequestBytes,
		MaxConcurrentCalls: maxConcurrentCalls,
		Scope:              pb.Scope_SCOPE_SAMPLE,
		RequiredMetadata:   requiredColumns,
	}, nil
}

func (s *service) Score(ctx context.Context, request *pb.ScoreRequest) (*pb.ScoreResponse, error) {
	if err := checkRequest(request); err != nil {
		return nil, err
	}
	if err := checkReward(request.GetReward()); err != nil {
		return nil, err
	}
	jsonKeys := make(map[string]bool, len(request.GetJsonMetadataKeys()))
	for _, key := range request.GetJsonMetadataKeys() {
		jsonKeys[key] = true
	}
	response := &pb.ScoreResponse{}
	for _, sample := range request.GetSamples() {
		// Nobody waits for the rest of a call that was cancelled or is late.
		if err := ctx.Err(); err != nil {
			return nil, status.FromContextError(err).Err()
		}
		result, err := s.settle(request.GetRunId(), sample, jsonKeys)
		if err != nil {
			return nil, status.Errorf(codes.Internal, "sample %q: %v", sample.GetSampleId(), err)
		}
		response.Results = append(response.Results, result)
	}
	return response, nil
}

// settle returns the outcome that the sample has for good: the first one, for as long as it is remembered.
func (s *service) settle(runID string, sample *pb.Sample, jsonKeys map[string]bool) (*pb.SampleResult, error) {
	digest, err := digestOf(sample, jsonKeys)
	if err != nil {
		return nil, err
	}
	key := sampleKey{runID, sample.GetSampleId()}
	known, ok := s.memory.Get(key)
	if !ok {
		known = settled{digest, resultOf(sample, jsonKeys)}
		// Another call may have settled the same sample meanwhile; then its answer is the answer.
		if earlier, ok, _ := s.memory.PeekOrAdd(key, known); ok {
			known = earlier
		}
	}
	if known.digest != digest {
		clash := failed("SAMPLE_ID_CLASH", "this sample_id came with other content before")
		return &pb.SampleResult{SampleId: sample.GetSampleId(), Outcome: &pb.SampleResult_Failed{Failed: clash}}, nil
	}
	return known.result, nil
}

// resultOf judges one sample.
func resultOf(sample *pb.Sample, jsonKeys map[string]bool) *pb.SampleResult {
	var scored *pb.Scored
	columns, failure := readColumns(sample, jsonKeys)
	if failure == nil {
		failure = checkMessages(sample.GetMessages())
	}
	if failure == nil {
		scored, failure = judge(sample.GetCompletion(), columns)
	}
	result := &pb.SampleResult{SampleId: sample.GetSampleId()}
	if failure != nil {
		result.Outcome = &pb.SampleResult_Failed{Failed: failure}
	} else {
		result.Outcome = &pb.SampleResult_Scored{Scored: scored}
	}
	return result
}

// digestOf stands for all that a score may depend on: the sample without its group, and which of its columns are JSON.
func digestOf(sample *pb.Sample, jsonKeys map[string]bool) ([sha256.Size]byte, error) {
	content := proto.CloneOf(sample)
	content.GroupId, content.GroupSize = "", 0
	judged := &pb.ScoreRequest{Samples: []*pb.Sample{content}}
	for key := range content.GetMetadata() {
		if jsonKeys[key] {
			judged.JsonMetadataKeys = append(judged.JsonMetadataKeys, key)
		}
	}
	slices.Sort(judged.JsonMetadataKeys)
	// Maps have no order of their own; without Deterministic every call would write them in another one.
	bytes, err := proto.MarshalOptions{Deterministic: true}.Marshal(judged)
	return sha256.Sum256(bytes), err
}
