package main

import (
	"maps"
	"strings"
	"testing"

	pb "example.com/reward/gen/rlhf/reward/v1"
)

func TestAJSONColumnStandsForItsText(t *testing.T) {
	for value, want := range map[string]map[string]string{
		`"4\u0032"`:            {"answer": "42"},
		"\t42.0\n":             {"answer": "42.0"},
		`12345678901234567890`: {"answer": "12345678901234567890"},
		` [1, {"a": null}] `:   {"answer": `[1, {"a": null}]`},
		"\tnull\n":             {},
	} {
		sample := &pb.Sample{Metadata: map[string]string{"answer": value}}
		columns, failure := readColumns(sample, keySet([]string{"answer"}))
		if failure != nil || !maps.Equal(columns, want) {
			t.Errorf("%q: got %v and %v, want %v", value, columns, failure, want)
		}
	}
}

func TestAColumnThatIsNotListedAsJSONIsTextAsItIs(t *testing.T) {
	sample := &pb.Sample{Metadata: map[string]string{"answer": ` "42`}}
	columns, failure := readColumns(sample, keySet([]string{"other"}))
	if failure != nil || columns["answer"] != ` "42` {
		t.Errorf("got %v and %v", columns, failure)
	}
}

func TestWhatIsNotJSONFailsUnderAnyListedKey(t *testing.T) {
	for _, value := range []string{"", "nope", "NaN", "'a'", "01", "[1,]", "1 2", "\"a\nb\"", "\u00a042"} {
		sample := &pb.Sample{Metadata: map[string]string{"answer": "42", "source": value}}
		columns, failure := readColumns(sample, keySet([]string{"source"}))
		if failure.GetCode() != "INVALID_METADATA" || !strings.Contains(failure.GetMessage(), `"source"`) {
			t.Errorf("%q: got %v and %v", value, columns, failure)
		}
	}
}

func TestAMessageOfAFailureIsNeverLongerThanTheContractAllows(t *testing.T) {
	key := strings.Repeat("\U0010ffff", 2000)
	sample := &pb.Sample{Metadata: map[string]string{key: "nope"}}
	_, failure := readColumns(sample, keySet([]string{key}))
	if length := len(failure.GetMessage()); length == 0 || length > 1024 {
		t.Errorf("%d bytes", length)
	}
}

func TestAConversationIsCheckedTurnByTurn(t *testing.T) {
	text := &pb.ContentPart{Kind: &pb.ContentPart_Text{}}
	for _, test := range []struct {
		name, want string
		message    *pb.ChatMessage
	}{
		{"an empty text is a text", "", &pb.ChatMessage{Parts: []*pb.ContentPart{text}}},
		{"a part of no known kind fails", "UNKNOWN_CONTENT", &pb.ChatMessage{Parts: []*pb.ContentPart{text, {}}}},
		{"an object may say more", "", &pb.ChatMessage{ExtraJson: ` {"name": "a"}`}},
		{"an array is no object", "INVALID_METADATA", &pb.ChatMessage{ExtraJson: `[]`}},
		{"null is no object", "INVALID_METADATA", &pb.ChatMessage{ExtraJson: `null`}},
		{"white space is no object", "INVALID_METADATA", &pb.ChatMessage{ExtraJson: ` `}},
		{"two objects are no object", "INVALID_METADATA", &pb.ChatMessage{ExtraJson: `{} {}`}},
	} {
		t.Run(test.name, func(t *testing.T) {
			failure := checkMessages([]*pb.ChatMessage{{}, test.message})
			if failure.GetCode() != test.want {
				t.Errorf("got %v, want %q", failure, test.want)
			}
			if failure != nil && !strings.Contains(failure.GetMessage(), "messages[1]") {
				t.Errorf("%q does not name the turn", failure.GetMessage())
			}
		})
	}
}

func keySet(keys []string) map[string]bool {
	set := make(map[string]bool, len(keys))
	for _, key := range keys {
		set[key] = true
	}
	return set
}
