package main

import (
	"context"
	"fmt"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "example.com/reward/gen/rlhf/reward/v1"
)

func TestARepeatedSampleGetsTheSameAnswerInAnyCompany(t *testing.T) {
	rewards := newTestService(t, 10)
	first := scoreAll(t, rewards, requestOf(2))
	again := requestOf(3)
	again.Samples = []*pb.Sample{again.Samples[2], again.Samples[1]}
	again.Samples[1].GroupId, again.Samples[1].GroupSize = "another", 7
	if second := scoreAll(t, rewards, again); !proto.Equal(first.Results[1], second.Results[1]) {
		t.Errorf("got %v, then %v", first.Results[1], second.Results[1])
	}
}

func TestOtherContentUnderAKnownIdIsAClash(t *testing.T) {
	for name, change := range map[string]func(*pb.ScoreRequest){
		"another completion":      func(r *pb.ScoreRequest) { r.Samples[0].Completion = "43" },
		"another prompt":          func(r *pb.ScoreRequest) { r.Samples[0].Prompt = "6 × 7" },
		"another column":          func(r *pb.ScoreRequest) { r.Samples[0].Metadata["source"] = "a" },
		"a column that fails":     func(r *pb.ScoreRequest) { delete(r.Samples[0].Metadata, answerColumn) },
		"a column read as JSON":   func(r *pb.ScoreRequest) { r.JsonMetadataKeys = []string{answerColumn} },
		"another reason to end":   func(r *pb.ScoreRequest) { r.Samples[0].FinishReason = pb.FinishReason_FINISH_REASON_EOS },
		"a turn of conversation":  func(r *pb.ScoreRequest) { r.Samples[0].Messages = []*pb.ChatMessage{{Role: "user"}} },
		"the tokens beside texts": func(r *pb.ScoreRequest) { r.Samples[0].CompletionTokenIds = []uint32{7} },
	} {
		t.Run(name, func(t *testing.T) {
			rewards := newTestService(t, 10)
			first := scoreAll(t, rewards, requestOf(1))
			other := requestOf(1)
			change(other)
			if got := scoreAll(t, rewards, other).Results[0]; got.GetFailed().GetCode() != "SAMPLE_ID_CLASH" {
				t.Errorf("got %v", got)
			}
			if again := scoreAll(t, rewards, requestOf(1)); !proto.Equal(first, again) {
				t.Errorf("the clash replaced the outcome: got %v, want %v", again, first)
			}
		})
	}
}

func TestIdsOfAnotherRunAndKeysThatNoSampleHasAreNoClash(t *testing.T) {
	rewards := newTestService(t, 10)
	scoreAll(t, rewards, requestOf(1))
	sameAgain := requestOf(1)
	sameAgain.JsonMetadataKeys = []string{"absent"}
	otherRun := requestOf(1)
	otherRun.RunId = "another"
	otherRun.Samples[0].Completion = "43"
	for _, request := range []*pb.ScoreRequest{sameAgain, otherRun} {
		if got := scoreAll(t, rewards, request).Results[0]; got.GetScored() == nil {
			t.Errorf("got %v", got)
		}
	}
}

func TestTheMemoryForgetsTheLeastRecentlyUsed(t *testing.T) {
	rewards := newTestService(t, 2)
	samples := requestOf(3).Samples
	for _, index := range []int{0, 1, 0, 2} {
		scoreAll(t, rewards, &pb.ScoreRequest{RunId: "run", Samples: samples[index : index+1]})
	}
	if length := rewards.memory.Len(); length != 2 {
		t.Errorf("%d outcomes are remembered", length)
	}
	changed := requestOf(2)
	for _, sample := range changed.Samples {
		sample.Completion = "43"
	}
	results := scoreAll(t, rewards, changed).Results
	if results[0].GetFailed().GetCode() != "SAMPLE_ID_CLASH" || results[1].GetScored() == nil {
		t.Errorf("want the first remembered and the second forgotten, got %v", results)
	}
}

func TestOneOfManyConcurrentContentsWins(t *testing.T) {
	rewards := newTestService(t, 10)
	results := make([]*pb.SampleResult, 32)
	var calls sync.WaitGroup
	for index := range results {
		calls.Go(func() {
			request := requestOf(1)
			request.Samples[0].Completion = fmt.Sprint(index)
			response, err := rewards.Score(context.Background(), request)
			if err == nil {
				results[index] = response.Results[0]
			}
		})
	}
	calls.Wait()
	scored := 0
	for _, result := range results {
		if result.GetScored() != nil {
			scored++
		} else if result.GetFailed().GetCode() != "SAMPLE_ID_CLASH" {
			t.Errorf("got %v", result)
		}
	}
	if scored != 1 {
		t.Errorf("%d contents were scored under one id", scored)
	}
}

func TestACallThatNobodyWaitsForStops(t *testing.T) {
	rewards := newTestService(t, 10)
	cancelled, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := rewards.Score(cancelled, requestOf(2)); status.Code(err) != codes.Canceled {
		t.Errorf("got %v", err)
	}
	if length := rewards.memory.Len(); length != 0 {
		t.Errorf("%d samples were judged", length)
	}
}

func newTestService(t *testing.T, remembered int) *service {
	t.Helper()
	rewards, err := newService(remembered)
	if err != nil {
		t.Fatal(err)
	}
	return rewards
}

func scoreAll(t *testing.T, rewards *service, request *pb.ScoreRequest) *pb.ScoreResponse {
	t.Helper()
	response, err := rewards.Score(context.Background(), request)
	if err != nil {
		t.Fatal(err)
	}
	return response
}
