package main

import (
	"fmt"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "example.com/reward/gen/rlhf/reward/v1"
)

const (
	maxIDBytes = 256
	// Enough to see the pattern: a status travels in trailers, of which clients take about 8 KB.
	mostViolations = 8
)

// violations are the wrong fields of a request, each with its path as the contract writes it.
type violations []*errdetails.BadRequest_FieldViolation

func (v *violations) add(path, format string, args ...any) {
	if len(*v) < mostViolations {
		description := fmt.Sprintf(format, args...)
		*v = append(*v, &errdetails.BadRequest_FieldViolation{Field: path, Description: description})
	}
}

// checkRequest returns INVALID_ARGUMENT with the wrong fields of the request, or nil.
func checkRequest(request *pb.ScoreRequest) error {
	var found violations
	found.checkID("run_id", request.GetRunId())
	switch count := len(request.GetSamples()); {
	case count == 0:
		found.add("samples", "at least one sample is required")
	case count > maxSamples:
		found.add("samples", "%d samples; max_samples is %d", count, maxSamples)
	default:
		found.checkSamples(request.GetSamples())
	}
	if len(found) > 0 {
		return refusal(codes.InvalidArgument, "INVALID_FIELD", found)
	}
	return nil
}

// checkReward returns NOT_FOUND unless the name is that of the one reward here, or empty for the default.
func checkReward(name string) error {
	if name == "" || name == rewardName {
		return nil
	}
	var found violations
	found.add("reward", "reward %.64q not found; the only one here is %q", name, rewardName)
	return refusal(codes.NotFound, "NOT_FOUND", found)
}

func (v *violations) checkSamples(samples []*pb.Sample) {
	firstWith := make(map[string]int, len(samples))
	for index, sample := range samples {
		path := fmt.Sprintf("samples[%d]", index)
		v.checkID(path+".sample_id", sample.GetSampleId())
		if first, repeated := firstWith[sample.GetSampleId()]; !repeated {
			firstWith[sample.GetSampleId()] = index
		} else if sample.GetSampleId() != "" {
			v.add(path+".sample_id", "the same as samples[%d].sample_id", first)
		}
		if sample.GetGroupId() == "" {
			v.add(path+".group_id", "required")
		}
		v.checkRanges(path, sample)
	}
}

func (v *violations) checkID(path, id string) {
	if id == "" {
		v.add(path, "required")
	} else if len(id) > maxIDBytes {
		v.add(path, "%d bytes; the limit is %d", len(id), maxIDBytes)
	}
}

func (v *violations) checkRanges(path string, sample *pb.Sample) {
	count := uint32(len(sample.GetCompletionTokenIds()))
	var end uint32
	for index, tokens := range sample.GetSampledRanges() {
		// A request has room for a million wrong ranges.
		if len(*v) == mostViolations {
			return
		}
		first, pastLast := tokens.GetFirst(), tokens.GetPastLast()
		if first < end {
			v.add(fmt.Sprintf("%s.sampled_ranges[%d].first", path, index),
				"%d is below %d, where the range before it ends", first, end)
		}
		if pastLast <= first {
			v.add(fmt.Sprintf("%s.sampled_ranges[%d].past_last", path, index), "%d is not above first, %d", pastLast, first)
		} else if pastLast > count {
			v.add(fmt.Sprintf("%s.sampled_ranges[%d].past_last", path, index),
				"%d is beyond the %d completion_token_ids", pastLast, count)
		}
		end = max(end, pastLast)
	}
}

// refusal is the status of a call that can never succeed, with the google.rpc details by which clients find out why.
func refusal(code codes.Code, reason string, found violations) error {
	lines := make([]string, len(found))
	for index, violation := range found {
		lines[index] = violation.GetField() + ": " + violation.GetDescription()
	}
	detailed, err := status.New(code, strings.Join(lines, "; ")).WithDetails(
		&errdetails.ErrorInfo{Domain: "rlhf-services", Reason: reason},
		&errdetails.BadRequest{FieldViolations: found},
	)
	if err != nil {
		return status.Errorf(codes.Internal, "cannot describe a wrong request: %v", err)
	}
	return detailed.Err()
}
