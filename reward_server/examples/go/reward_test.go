package main

import (
	"encoding/json"
	"math"
	"os"
	"strings"
	"testing"

	pb "example.com/reward/gen/rlhf/reward/v1"
)

func TestTheRewardIsTheSumOfItsParts(t *testing.T) {
	for _, test := range []struct {
		name, completion, reference string
		want                        parts
	}{
		{"an answer alone matches", "42", "42", parts{match: 1}},
		{"white space around either is no difference", " \t42\r\n", "\n42 ", parts{match: 1}},
		{"an answer in a sentence's form has the bonus", "42 .", "42", parts{match: 1, format: 0.25}},
		{"only one mark is the sentence's end", "42!?", "42!", parts{match: 1, format: 0.25}},
		{"a mark before the end is none", "4.2", "42", parts{}},
		{"a no-break space is not white space", "\u00a042", "42", parts{}},
		{"a mark alone is the empty answer", "?", "", parts{match: 1, format: 0.25}},
		{"64 code points cost nothing", strings.Repeat("é", 64), "x", parts{}},
		{"every further one costs 1/256", strings.Repeat("😀", 65), "x", parts{length: -1.0 / 256}},
		{"white space counts for the length", "42" + strings.Repeat(" ", 126), "42", parts{match: 1, length: -0.25}},
		{"the length costs at most 1", strings.Repeat("x", 1000), "x", parts{length: -1}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if got := compare(test.completion, test.reference); got != test.want {
				t.Errorf("got %+v, want %+v", got, test.want)
			}
		})
	}
}

func TestEveryGoldenSampleHasItsRewardToTheLastBit(t *testing.T) {
	type vector struct {
		ID               string
		Completion       string
		Metadata         map[string]string
		JSONMetadataKeys []string `json:"json_metadata_keys"`
		Outcome, Code    string
		Reward           float64
		Components       map[string]float64
	}
	content, err := os.ReadFile("../../../tests/reward_server/examples/golden/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors []vector
	if err := json.Unmarshal(content, &vectors); err != nil {
		t.Fatal(err)
	}
	if len(vectors) != 200 {
		t.Fatalf("%d golden samples, want 200", len(vectors))
	}
	for _, want := range vectors {
		sample := &pb.Sample{SampleId: want.ID, Completion: want.Completion, Metadata: want.Metadata}
		got := resultOf(sample, keySet(want.JSONMetadataKeys))
		switch want.Outcome {
		case "failed":
			if got.GetFailed().GetCode() != want.Code {
				t.Errorf("%s: got %v, want the code %s", want.ID, got, want.Code)
			}
		case "scored":
			if got.GetScored() == nil || !sameBits(got.GetScored().GetReward(), want.Reward) {
				t.Errorf("%s: got %v, want the reward %v", want.ID, got, want.Reward)
			}
			components := got.GetScored().GetComponents()
			for name, value := range want.Components {
				if !sameBits(components[name], value) {
					t.Errorf("%s: got %s %v, want %v", want.ID, name, components[name], value)
				}
			}
			if len(components) != len(want.Components) {
				t.Errorf("%s: got the components %v, want %v", want.ID, components, want.Components)
			}
		default:
			t.Errorf("%s: no outcome is called %q", want.ID, want.Outcome)
		}
	}
}

// sameBits tells 0 from -0, which == does not.
func sameBits(a, b float64) bool {
	return math.Float64bits(a) == math.Float64bits(b)
}
