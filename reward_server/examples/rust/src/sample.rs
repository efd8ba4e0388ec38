//! What is wrong with one sample alone is that sample's outcome, never an error of the call: the others are judged.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use serde_json::value::RawValue;

use crate::pb::{ChatMessage, Failed, Sample};

/// The columns of a prompt's row that have a value, as text.
pub type Columns<'a> = HashMap<&'a str, Cow<'a, str>>;

const LONGEST_QUOTE: usize = 64;

/// Why a sample can never be judged. Cut what comes from the sample: a message has 1 KiB.
pub fn failed(code: &str, message: String) -> Failed {
    Failed { code: code.to_owned(), message }
}

/// The columns of the sample's row: under `json_keys`, a JSON string stands for its content and any other JSON for
/// its own text.
pub fn read_columns<'a>(sample: &'a Sample, json_keys: &HashSet<&str>) -> Result<Columns<'a>, Failed> {
    let mut columns = Columns::with_capacity(sample.metadata.len());
    for (key, value) in &sample.metadata {
        if !json_keys.contains(key.as_str()) {
            columns.insert(key, value.into());
            continue;
        }
        let text = read_json(value).map_err(|error| {
            let quoted: String = key.chars().take(LONGEST_QUOTE).collect();
            failed("INVALID_METADATA", format!("the column {quoted:?} is not JSON: {error}"))
        })?;
        // JSON null means what an absent key means.
        if let Some(text) = text {
            columns.insert(key, text);
        }
    }
    Ok(columns)
}

/// The text that a JSON value stands for; none for null.
fn read_json(value: &str) -> serde_json::Result<Option<Cow<'_, str>>> {
    // A RawValue is checked but not decoded: a number keeps its digits, and nesting has no limit.
    let raw: &RawValue = serde_json::from_str(value)?;
    Ok(match raw.get() {
        "null" => None,
        text if text.starts_with('"') => Some(serde_json::from_str::<String>(text)?.into()),
        text => Some(text.into()),
    })
}

/// Refuses a conversation that cannot be judged.
pub fn check_messages(messages: &[ChatMessage]) -> Result<(), Failed> {
    for (index, message) in messages.iter().enumerate() {
        // A kind that came after this server was built looks unset. To skip it would be to judge something else.
        if message.parts.iter().any(|part| part.kind.is_none()) {
            let message = format!("messages[{index}] has a part of a kind that is unknown here");
            return Err(failed("UNKNOWN_CONTENT", message));
        }
        let extra = &message.extra_json;
        if !extra.is_empty() && !is_json_object(extra) {
            return Err(failed("INVALID_METADATA", format!("messages[{index}].extra_json is not a JSON object")));
        }
    }
    Ok(())
}

fn is_json_object(text: &str) -> bool {
    serde_json::from_str::<&RawValue>(text).is_ok_and(|raw| raw.get().starts_with('{'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::{ContentPart, content_part::Kind};

    fn sample(key: &str, value: &str) -> Sample {
        Sample { metadata: [(key.to_owned(), value.to_owned())].into(), ..Sample::default() }
    }

    #[test]
    fn a_json_column_stands_for_its_text() {
        for (value, want) in [
            (r#""4\u0032""#, Some("42")),
            ("\t42.0\n", Some("42.0")),
            ("12345678901234567890", Some("12345678901234567890")),
            (r#" [1, {"a": null}] "#, Some(r#"[1, {"a": null}]"#)),
            ("\tnull\n", None),
        ] {
            let sample = sample("answer", value);
            let columns = read_columns(&sample, &HashSet::from(["answer"])).unwrap();
            assert_eq!(columns.get("answer").map(|text| &**text), want, "{value:?}");
        }
    }

    #[test]
    fn a_column_that_is_not_listed_as_json_is_text_as_it_is() {
        let sample = sample("answer", r#" "42"#);
        assert_eq!(read_columns(&sample, &HashSet::from(["other"])).unwrap()["answer"], r#" "42"#);
    }

    #[test]
    fn what_is_not_json_fails_under_any_listed_key() {
        for value in ["", "nope", "NaN", "'a'", "01", "[1,]", "1 2", "\"a\nb\"", "\u{a0}42"] {
            let failure = read_columns(&sample("source", value), &HashSet::from(["source"])).unwrap_err();
            assert_eq!(failure.code, "INVALID_METADATA", "{value:?}");
            assert!(failure.message.contains("\"source\""), "{}", failure.message);
        }
    }

    #[test]
    fn the_message_of_a_failure_is_never_longer_than_the_contract_allows() {
        let key = "\u{10ffff}".repeat(2000);
        let failure = read_columns(&sample(&key, "nope"), &HashSet::from([key.as_str()])).unwrap_err();
        assert!(failure.message.len() <= 1024, "{} bytes", failure.message.len());
    }

    #[test]
    fn a_part_of_no_known_kind_fails_and_an_empty_text_does_not() {
        let text = ContentPart { kind: Some(Kind::Text(String::new())) };
        let known = ChatMessage { parts: vec![text.clone()], ..ChatMessage::default() };
        let unknown = ChatMessage { parts: vec![text, ContentPart { kind: None }], ..ChatMessage::default() };
        assert_eq!(check_messages(std::slice::from_ref(&known)), Ok(()));
        let failure = check_messages(&[known, unknown]).unwrap_err();
        assert_eq!(failure.code, "UNKNOWN_CONTENT");
        assert!(failure.message.contains("messages[1]"), "{}", failure.message);
    }

    #[test]
    fn only_a_json_object_may_say_more_of_a_turn() {
        let check = |extra: &str| check_messages(&[ChatMessage { extra_json: extra.into(), ..ChatMessage::default() }]);
        assert_eq!(check(""), Ok(()));
        assert_eq!(check(r#" {"name": "a"}"#), Ok(()));
        for extra in ["[]", "null", " ", "{} {}", "{a: 1}"] {
            assert_eq!(check(extra).unwrap_err().code, "INVALID_METADATA", "{extra:?}");
        }
    }
}
