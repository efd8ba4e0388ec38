//! What a request must be, as the contract promises it; everything here is the caller's mistake.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt as _};

use crate::pb::{Sample, ScoreRequest};
use crate::reward::NAME;
use crate::service::MAX_SAMPLES;

const DOMAIN: &str = "rlhf-services";
const MAX_ID_BYTES: usize = 256;
/// Enough to see the pattern: a status travels in trailers, of which clients take about 8 KB.
const MOST_VIOLATIONS: usize = 8;
const LONGEST_QUOTE: usize = 64;

/// INVALID_ARGUMENT with the wrong fields of the request, if any are.
pub fn check_request(request: &ScoreRequest) -> Result<(), Status> {
    let mut wrong = Violations::default();
    wrong.check_id("run_id", &request.run_id);
    match request.samples.len() {
        0 => wrong.add("samples", "at least one sample is required"),
        count if count > MAX_SAMPLES => wrong.add("samples", format!("{count} samples; max_samples is {MAX_SAMPLES}")),
        _ => wrong.check_samples(&request.samples),
    }
    wrong.refuse(Code::InvalidArgument, "INVALID_FIELD")
}

/// NOT_FOUND unless `name` is that of the one reward here, or empty for the default.
pub fn check_reward(name: &str) -> Result<(), Status> {
    let mut wrong = Violations::default();
    if !name.is_empty() && name != NAME {
        let quoted: String = name.chars().take(LONGEST_QUOTE).collect();
        wrong.add("reward", format!("reward {quoted:?} not found; the only one here is {NAME:?}"));
    }
    wrong.refuse(Code::NotFound, "NOT_FOUND")
}

/// The wrong fields of a request, each with its path as the contract writes it.
#[derive(Default)]
struct Violations(Vec<FieldViolation>);

impl Violations {
    fn add(&mut self, path: impl Into<String>, description: impl Into<String>) {
        if !self.is_full() {
            self.0.push(FieldViolation::new(path, description));
        }
    }

    fn is_full(&self) -> bool {
        self.0.len() == MOST_VIOLATIONS
    }

    fn check_samples(&mut self, samples: &[Sample]) {
        let mut first_with = HashMap::with_capacity(samples.len());
        for (index, sample) in samples.iter().enumerate() {
            let path = format!("samples[{index}]");
            self.check_id(&format!("{path}.sample_id"), &sample.sample_id);
            match first_with.entry(&sample.sample_id) {
                Entry::Vacant(free) => _ = free.insert(index),
                // Empty ids are all alike, and each is wrong already.
                Entry::Occupied(first) if !sample.sample_id.is_empty() => {
                    self.add(format!("{path}.sample_id"), format!("the same as samples[{}].sample_id", first.get()));
                }
                Entry::Occupied(_) => {}
            }
            if sample.group_id.is_empty() {
                self.add(format!("{path}.group_id"), "required");
            }
            self.check_ranges(&path, sample);
        }
    }

    fn check_id(&mut self, path: &str, id: &str) {
        if id.is_empty() {
            self.add(path, "required");
        } else if id.len() > MAX_ID_BYTES {
            self.add(path, format!("{} bytes; the limit is {MAX_ID_BYTES}", id.len()));
        }
    }

    fn check_ranges(&mut self, path: &str, sample: &Sample) {
        let count = sample.completion_token_ids.len();
        let mut end = 0;
        for (index, range) in sample.sampled_ranges.iter().enumerate() {
            // A request has room for a million wrong ranges.
            if self.is_full() {
                return;
            }
            let (path, first, past_last) = (format!("{path}.sampled_ranges[{index}]"), range.first, range.past_last);
            if first < end {
                self.add(format!("{path}.first"), format!("{first} is below {end}, where the range before it ends"));
            }
            if past_last <= first {
                self.add(format!("{path}.past_last"), format!("{past_last} is not above first, {first}"));
            } else if past_last as usize > count {
                self.add(
                    format!("{path}.past_last"),
                    format!("{past_last} is beyond the {count} completion_token_ids"),
                );
            }
            end = end.max(past_last);
        }
    }

    /// If any field is wrong: a status with the google.rpc details by which clients find out which, and why.
    fn refuse(self, code: Code, reason: &str) -> Result<(), Status> {
        if self.0.is_empty() {
            return Ok(());
        }
        let lines: Vec<_> = self.0.iter().map(|wrong| format!("{}: {}", wrong.field, wrong.description)).collect();
        let mut details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new());
        details.set_bad_request(self.0);
        Err(Status::with_error_details(code, lines.join("; "), details))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::TokenRange;
    use crate::service::tests::request_of;

    /// The wrong fields that a refusal names, with its reason and domain checked.
    fn refused(result: Result<(), Status>, code: Code, reason: &str) -> Vec<(String, String)> {
        let status = result.unwrap_err();
        assert_eq!(status.code(), code);
        let details = status.get_error_details();
        let info = details.error_info().unwrap();
        assert_eq!((info.reason.as_str(), info.domain.as_str()), (reason, "rlhf-services"));
        let wrong = details.bad_request().unwrap().field_violations.iter();
        wrong.map(|wrong| (wrong.field.clone(), wrong.description.clone())).collect()
    }

    fn range(first: u32, past_last: u32) -> TokenRange {
        TokenRange { first, past_last }
    }

    fn with_ranges(ranges: Vec<TokenRange>) -> ScoreRequest {
        let mut request = request_of(2);
        request.samples[1].completion_token_ids = vec![7, 8, 9];
        request.samples[1].sampled_ranges = ranges;
        request
    }

    fn spoilt(spoil: impl FnOnce(&mut ScoreRequest)) -> ScoreRequest {
        let mut request = request_of(2);
        spoil(&mut request);
        request
    }

    #[test]
    fn a_well_formed_request_passes() {
        let mut request = request_of(MAX_SAMPLES);
        request.run_id = "r".repeat(256);
        request.samples[0].sample_id = "é".repeat(128);
        assert!(check_request(&request).is_ok());
        assert!(check_request(&with_ranges(vec![range(0, 1), range(1, 3)])).is_ok());
    }

    #[test]
    fn a_wrong_field_is_named_by_its_path() {
        let ranges = "samples[1].sampled_ranges";
        for (path, says, request) in [
            ("run_id", "required", spoilt(|r| r.run_id.clear())),
            ("run_id", "258 bytes; the limit is 256", spoilt(|r| r.run_id = "é".repeat(129))),
            ("samples", "at least one", spoilt(|r| r.samples.clear())),
            ("samples", "257 samples; max_samples is 256", request_of(257)),
            ("samples[1].sample_id", "required", spoilt(|r| r.samples[1].sample_id.clear())),
            ("samples[1].sample_id", "300 bytes", spoilt(|r| r.samples[1].sample_id = "s".repeat(300))),
            (
                "samples[1].sample_id",
                "samples[0].sample_id",
                spoilt(|r| r.samples[1].sample_id = r.samples[0].sample_id.clone()),
            ),
            ("samples[1].group_id", "required", spoilt(|r| r.samples[1].group_id.clear())),
            (&format!("{ranges}[1].first"), "1 is below 2", with_ranges(vec![range(0, 2), range(1, 3)])),
            (&format!("{ranges}[1].first"), "0 is below 3", with_ranges(vec![range(2, 3), range(0, 1)])),
            (&format!("{ranges}[0].past_last"), "2 is not above first, 2", with_ranges(vec![range(2, 2)])),
            (&format!("{ranges}[0].past_last"), "4 is beyond the 3", with_ranges(vec![range(0, 4)])),
            (
                &format!("{ranges}[0].past_last"),
                "1 is beyond the 0",
                spoilt(|r| r.samples[1].sampled_ranges = vec![range(0, 1)]),
            ),
        ] {
            let found = refused(check_request(&request), Code::InvalidArgument, "INVALID_FIELD");
            assert!(matches!(&found[..], [(field, why)] if field == path && why.contains(says)), "{path}: {found:?}");
        }
    }

    #[test]
    fn all_wrong_fields_are_named_but_no_more_than_eight() {
        let mut request = request_of(20);
        request.run_id.clear();
        request.samples.iter_mut().for_each(|sample| sample.group_id.clear());
        let found = refused(check_request(&request), Code::InvalidArgument, "INVALID_FIELD");
        let paths: Vec<_> = found.into_iter().map(|(path, _)| path).collect();
        let groups = (0..7).map(|index| format!("samples[{index}].group_id"));
        assert_eq!(paths, ["run_id".to_owned()].into_iter().chain(groups).collect::<Vec<_>>());
    }

    #[test]
    fn only_the_rewards_own_name_and_no_name_are_found() {
        assert!(check_reward("").is_ok());
        assert!(check_reward(NAME).is_ok());
        // The longest name that fits a request must not make a status that is too large for its trailers.
        let long = "\u{10ffff}".repeat(100_000);
        let found = refused(check_reward(&long), Code::NotFound, "NOT_FOUND");
        assert!(matches!(&found[..], [(path, why)] if path == "reward" && why.len() < 1024), "{found:?}");
    }
}
