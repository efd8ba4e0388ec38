package main

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "example.com/reward/gen/rlhf/reward/v1"
)

func TestAWellFormedRequestPasses(t *testing.T) {
	request := requestOf(maxSamples)
	request.RunId = strings.Repeat("r", maxIDBytes)
	request.Samples[0].SampleId = strings.Repeat("é", maxIDBytes/2)
	request.Samples[0].CompletionTokenIds = []uint32{7, 8, 9}
	request.Samples[0].SampledRanges = []*pb.TokenRange{{First: 0, PastLast: 1}, {First: 1, PastLast: 3}}
	if err := checkRequest(request); err != nil {
		t.Error(err)
	}
}

func TestAWrongFieldIsNamedByItsPath(t *testing.T) {
	ranges := func(ranges ...*pb.TokenRange) func(*pb.ScoreRequest) {
		return func(r *pb.ScoreRequest) {
			r.Samples[1].CompletionTokenIds = []uint32{7, 8, 9}
			r.Samples[1].SampledRanges = ranges
		}
	}
	for _, test := range []struct {
		name, path, says string
		spoil            func(*pb.ScoreRequest)
	}{
		{"no run", "run_id", "required", func(r *pb.ScoreRequest) { r.RunId = "" }},
		{"a long run", "run_id", "258 bytes; the limit is 256",
			func(r *pb.ScoreRequest) { r.RunId = strings.Repeat("é", 129) }},
		{"no samples", "samples", "at least one", func(r *pb.ScoreRequest) { r.Samples = nil }},
		{"many samples", "samples", "257 samples; max_samples is 256",
			func(r *pb.ScoreRequest) { r.Samples = requestOf(257).Samples }},
		{"no id", "samples[1].sample_id", "required",
			func(r *pb.ScoreRequest) { r.Samples[1].SampleId = "" }},
		{"a long id", "samples[1].sample_id", "300 bytes; the limit is 256",
			func(r *pb.ScoreRequest) { r.Samples[1].SampleId = strings.Repeat("s", 300) }},
		{"an id again", "samples[1].sample_id", "samples[0].sample_id",
			func(r *pb.ScoreRequest) { r.Samples[1].SampleId = r.Samples[0].SampleId }},
		{"no group", "samples[1].group_id", "required",
			func(r *pb.ScoreRequest) { r.Samples[1].GroupId = "" }},
		{"ranges that overlap", "samples[1].sampled_ranges[1].first", "1 is below 2",
			ranges(&pb.TokenRange{First: 0, PastLast: 2}, &pb.TokenRange{First: 1, PastLast: 3})},
		{"ranges that descend", "samples[1].sampled_ranges[1].first", "0 is below 3",
			ranges(&pb.TokenRange{First: 2, PastLast: 3}, &pb.TokenRange{First: 0, PastLast: 1})},
		{"an empty range", "samples[1].sampled_ranges[0].past_last", "2 is not above first, 2",
			ranges(&pb.TokenRange{First: 2, PastLast: 2})},
		{"a range too far", "samples[1].sampled_ranges[0].past_last", "4 is beyond the 3",
			ranges(&pb.TokenRange{First: 0, PastLast: 4})},
		{"a range of no tokens", "samples[1].sampled_ranges[0].past_last", "1 is beyond the 0",
			func(r *pb.ScoreRequest) { r.Samples[1].SampledRanges = []*pb.TokenRange{{PastLast: 1}} }},
	} {
		t.Run(test.name, func(t *testing.T) {
			request := requestOf(2)
			test.spoil(request)
			found := refused(t, checkRequest(request), codes.InvalidArgument, "INVALID_FIELD")
			if len(found) != 1 || found[0].GetField() != test.path || !strings.Contains(found[0].GetDescription(), test.says) {
				t.Errorf("got %v, want %s: …%s…", found, test.path, test.says)
			}
		})
	}
}

func TestAllWrongFieldsAreNamedButNoMoreThanEight(t *testing.T) {
	request := requestOf(20)
	for _, sample := range request.Samples {
		sample.GroupId = ""
	}
	request.RunId = ""
	found := refused(t, checkRequest(request), codes.InvalidArgument, "INVALID_FIELD")
	var paths []string
	for _, violation := range found {
		paths = append(paths, violation.GetField())
	}
	want := []string{"run_id"}
	for index := range 7 {
		want = append(want, fmt.Sprintf("samples[%d].group_id", index))
	}
	if !slices.Equal(paths, want) {
		t.Errorf("got %v, want %v", paths, want)
	}
}

func TestOnlyTheRewardsOwnNameAndNoNameAreFound(t *testing.T) {
	for _, name := range []string{"", rewardName} {
		if err := checkReward(name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	// The longest name that fits a request must not make a status that is too large for its trailers.
	long := strings.Repeat("\U0010ffff", 100_000)
	found := refused(t, checkReward(long), codes.NotFound, "NOT_FOUND")
	if len(found) != 1 || found[0].GetField() != "reward" {
		t.Errorf("got %v", found)
	}
	if size := proto.Size(status.Convert(checkReward(long)).Proto()); size > 4096 {
		t.Errorf("the status has %d bytes", size)
	}
}

// requestOf returns a well-formed request of so many samples.
func requestOf(count int) *pb.ScoreRequest {
	request := &pb.ScoreRequest{RunId: "run"}
	for index := range count {
		request.Samples = append(request.Samples, &pb.Sample{
			SampleId:   fmt.Sprintf("sample-%d", index),
			GroupId:    "group",
			Completion: "42.",
			Metadata:   map[string]string{answerColumn: "42"},
		})
	}
	return request
}

// refused returns the wrong fields that an error names; it must have the code, the reason and the project's domain.
func refused(t *testing.T, err error, code codes.Code, reason string) []*errdetails.BadRequest_FieldViolation {
	t.Helper()
	if status.Code(err) != code {
		t.Fatalf("got %v, want %v", err, code)
	}
	var info *errdetails.ErrorInfo
	var wrong *errdetails.BadRequest
	for _, detail := range status.Convert(err).Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			info = detail
		case *errdetails.BadRequest:
			wrong = detail
		}
	}
	if info.GetReason() != reason || info.GetDomain() != "rlhf-services" {
		t.Errorf("got the reason %v, want %s of rlhf-services", info, reason)
	}
	return wrong.GetFieldViolations()
}
