package main

import (
	"strings"
	"unicode/utf8"

	pb "example.com/reward/gen/rlhf/reward/v1"
)

// To serve a reward of your own, replace this file: the constants say what it is, judge says what it does.

const (
	rewardName = "answer"
	// A trainer pins the version for a run: change it with anything that could change a score.
	rewardVersion = "1"
	answerColumn  = "answer"

	// Go's own idea of white space is that of Unicode; the reward's is narrower.
	whiteSpace = " \t\n\r"

	formatBonus       = 0.25
	freeLength        = 64
	fullPenaltyLength = 256
)

// requiredColumns are the columns without which no sample can be judged.
var requiredColumns = []string{answerColumn}

// judge returns the score of a completion, or why it can never have one. The columns are those of its prompt's row.
func judge(completion string, columns map[string]string) (*pb.Scored, *pb.Failed) {
	reference, ok := columns[answerColumn]
	if !ok {
		return nil, failed("MISSING_METADATA", "the row has no value in the column %q", answerColumn)
	}
	parts := compare(completion, reference)
	reward := parts.total()
	return &pb.Scored{
		Reward:     &reward,
		Components: map[string]float64{"match": parts.match, "format": parts.format, "length": parts.length},
	}, nil
}

// parts are what a reward is the sum of.
type parts struct{ match, format, length float64 }

// total adds the parts in the order that the specification gives: another one may round differently.
func (p parts) total() float64 {
	return (p.match + p.format) + p.length
}

// compare rates a completion by whether it gives the reference answer, ends as a sentence does, and is short.
func compare(completion, reference string) parts {
	var rated parts
	answer := strings.Trim(completion, whiteSpace)
	if last := len(answer) - 1; last >= 0 && strings.IndexByte(".!?", answer[last]) >= 0 {
		rated.format = formatBonus
		answer = strings.Trim(answer[:last], whiteSpace)
	}
	if answer == strings.Trim(reference, whiteSpace) {
		rated.match = 1
	}
	// Code points, which every language can count; len would count the bytes of UTF-8.
	excess := float64(utf8.RuneCountInString(completion) - freeLength)
	rated.length = -min(1, max(0, excess)/fullPenaltyLength)
	return rated
}
