package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	pb "example.com/reward/gen/rlhf/reward/v1"
)

// What is wrong with one sample alone is that sample's outcome, never an error of the call: the others are judged.

// failed says why a sample can never be judged. Cut what comes from the sample with %.64q: a message has 1 KiB.
func failed(code, format string, args ...any) *pb.Failed {
	return &pb.Failed{Code: code, Message: fmt.Sprintf(format, args...)}
}

// readColumns returns the columns of the sample's row that have a value, as text: a JSON string stands for its
// content, any other JSON for its own text.
func readColumns(sample *pb.Sample, jsonKeys map[string]bool) (map[string]string, *pb.Failed) {
	columns := make(map[string]string, len(sample.GetMetadata()))
	for key, value := range sample.GetMetadata() {
		if !jsonKeys[key] {
			columns[key] = value
			continue
		}
		var text *string
		var notAString *json.UnmarshalTypeError
		switch err := json.Unmarshal([]byte(value), &text); {
		case errors.As(err, &notAString):
			// As it was written: decoded and encoded again, a number could have other digits.
			columns[key] = strings.Trim(value, whiteSpace)
		case err != nil:
			return nil, failed("INVALID_METADATA", "the column %.64q is not JSON: %v", key, err)
		case text != nil: // nil is JSON null, which means what an absent key means
			columns[key] = *text
		}
	}
	return columns, nil
}

// checkMessages returns why the sample's conversation cannot be judged, or nil.
func checkMessages(messages []*pb.ChatMessage) *pb.Failed {
	for index, message := range messages {
		for _, part := range message.GetParts() {
			// A kind that came after this server was built looks unset. To skip it would be to judge something else.
			if part.GetKind() == nil {
				return failed("UNKNOWN_CONTENT", "messages[%d] has a part of a kind that is unknown here", index)
			}
		}
		var object map[string]json.RawMessage
		err := json.Unmarshal([]byte(message.GetExtraJson()), &object)
		if message.GetExtraJson() != "" && (err != nil || object == nil) {
			return failed("INVALID_METADATA", "messages[%d].extra_json is not a JSON object", index)
		}
	}
	return nil
}
