//! The reward `answer`: a completion should give the reference answer, end as a sentence does, and be short.
//!
//! To serve a reward of your own, replace this file: the constants say what it is, `judge` says what it does.

use crate::pb::{Failed, Scored};
use crate::sample::{Columns, failed};

pub const NAME: &str = "answer";
/// A trainer pins it for a run: change it with anything that could change a score.
pub const VERSION: &str = "1";
/// The columns without which no sample can be judged.
pub const REQUIRED_COLUMNS: [&str; 1] = [ANSWER];

const ANSWER: &str = "answer";
/// Rust's own idea of white space is that of Unicode; the reward's is narrower.
const WHITE_SPACE: [char; 4] = [' ', '\t', '\n', '\r'];
const FORMAT_BONUS: f64 = 0.25;
const FREE_LENGTH: usize = 64;
const FULL_PENALTY_LENGTH: f64 = 256.0;

/// The score of a completion, or why it can never have one. `columns` are those of its prompt's row.
pub fn judge(completion: &str, columns: &Columns) -> Result<Scored, Failed> {
    let reference = columns
        .get(ANSWER)
        .ok_or_else(|| failed("MISSING_METADATA", format!("the row has no value in the column {ANSWER:?}")))?;
    let Parts { r#match, format, length } = compare(completion, reference);
    let components = [("match", r#match), ("format", format), ("length", length)];
    Ok(Scored {
        // In the order that the specification gives: another one may round differently.
        reward: Some((r#match + format) + length),
        components: components.map(|(name, value)| (name.to_owned(), value)).into(),
        token_rewards: Vec::new(),
    })
}

/// What a reward is the sum of.
#[derive(Debug, PartialEq)]
struct Parts {
    r#match: f64,
    format: f64,
    length: f64,
}

fn compare(completion: &str, reference: &str) -> Parts {
    let text = completion.trim_matches(WHITE_SPACE);
    let (answer, format) = match text.strip_suffix(['.', '!', '?']) {
        Some(answer) => (answer.trim_matches(WHITE_SPACE), FORMAT_BONUS),
        None => (text, 0.0),
    };
    let is_match = answer == reference.trim_matches(WHITE_SPACE);
    // Code points, which every language can count; `len` would count the bytes of UTF-8.
    let excess = completion.chars().count().saturating_sub(FREE_LENGTH);
    Parts { r#match: if is_match { 1.0 } else { 0.0 }, format, length: -(excess as f64 / FULL_PENALTY_LENGTH).min(1.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(r#match: f64, format: f64, length: f64) -> Parts {
        Parts { r#match, format, length }
    }

    #[test]
    fn white_space_around_either_is_no_difference() {
        assert_eq!(compare(" \t42\r\n", "\n42 "), parts(1.0, 0.0, 0.0));
        assert_eq!(compare("\u{a0}42", "42"), parts(0.0, 0.0, 0.0));
    }

    #[test]
    fn one_mark_at_the_end_is_the_sentences_and_has_the_bonus() {
        assert_eq!(compare("42 .", "42"), parts(1.0, 0.25, 0.0));
        assert_eq!(compare("42!?", "42!"), parts(1.0, 0.25, 0.0));
        assert_eq!(compare("?", ""), parts(1.0, 0.25, 0.0));
        assert_eq!(compare("4.2", "42"), parts(0.0, 0.0, 0.0));
    }

    #[test]
    fn code_points_beyond_64_cost_a_256th_each_and_1_at_most() {
        assert_eq!(compare(&"é".repeat(64), "x"), parts(0.0, 0.0, 0.0));
        assert_eq!(compare(&"😀".repeat(65), "x"), parts(0.0, 0.0, -1.0 / 256.0));
        assert_eq!(compare(&format!("42{}", " ".repeat(126)), "42"), parts(1.0, 0.0, -0.25));
        assert_eq!(compare(&"x".repeat(1000), "x"), parts(0.0, 0.0, -1.0));
    }
}
