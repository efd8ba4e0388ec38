//! The calls of the contract, and the memory of what was answered.

use std::collections::HashSet;
use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard};

use lru::LruCache;
use prost::Message as _;
use sha2::{Digest as _, Sha256};
use tonic::{Request, Response, Status};

use crate::pb::reward_service_server::RewardService;
use crate::pb::sample_result::Outcome;
use crate::pb::{
    GetRewardInfoRequest, GetRewardInfoResponse, Sample, SampleResult, Scope, ScoreRequest, ScoreResponse,
};
use crate::request::{check_request, check_reward};
use crate::reward;
use crate::sample::{check_messages, failed, read_columns};

pub const MAX_SAMPLES: usize = 256;
/// Kept by tonic itself, which answers OUT_OF_RANGE before a larger request comes this far.
pub const MAX_REQUEST_BYTES: usize = 4 << 20;
const MAX_CONCURRENT_CALLS: u32 = 64;

/// Serves one reward, and remembers the outcomes of the samples asked for most recently.
pub struct Service {
    memory: Mutex<LruCache<SampleKey, Settled>>,
}

/// A sample's name: ids are unique within a run only.
#[derive(Hash, PartialEq, Eq)]
struct SampleKey {
    run_id: String,
    sample_id: String,
}

/// A final outcome, with the digest of the content that it is about.
#[derive(Clone)]
struct Settled {
    digest: [u8; 32],
    outcome: Outcome,
}

#[tonic::async_trait]
impl RewardService for Service {
    async fn score(&self, request: Request<ScoreRequest>) -> Result<Response<ScoreResponse>, Status> {
        let request = request.into_inner();
        check_request(&request)?;
        check_reward(&request.reward)?;
        let json_keys = request.json_metadata_keys.iter().map(String::as_str).collect();
        let mut results = Vec::with_capacity(request.samples.len());
        for sample in &request.samples {
            // Nobody waits for the rest of a call that was cancelled or is late: tonic drops its future, but can do so
            // only where it awaits.
            tokio::task::yield_now().await;
            let outcome = self.settle(&request.run_id, sample, &json_keys);
            results.push(SampleResult { sample_id: sample.sample_id.clone(), outcome: Some(outcome) });
        }
        Ok(Response::new(ScoreResponse { results }))
    }

    async fn get_reward_info(
        &self,
        request: Request<GetRewardInfoRequest>,
    ) -> Result<Response<GetRewardInfoResponse>, Status> {
        check_reward(&request.get_ref().reward)?;
        Ok(Response::new(GetRewardInfoResponse {
            name: reward::NAME.to_owned(),
            version: reward::VERSION.to_owned(),
            max_samples: MAX_SAMPLES as u32,
            max_request_bytes: MAX_REQUEST_BYTES as u32,
            max_concurrent_calls: MAX_CONCURRENT_CALLS,
            scope: Scope::Sample.into(),
            required_metadata: reward::REQUIRED_COLUMNS.map(str::to_owned).into(),
            ..GetRewardInfoResponse::default()
        }))
    }
}

impl Service {
    pub fn new(remembered: NonZeroUsize) -> Self {
        Self { memory: Mutex::new(LruCache::new(remembered)) }
    }

    /// The outcome that the sample has for good: the first one, for as long as it is remembered.
    fn settle(&self, run_id: &str, sample: &Sample, json_keys: &HashSet<&str>) -> Outcome {
        let digest = digest_of(sample, json_keys);
        let key = SampleKey { run_id: run_id.to_owned(), sample_id: sample.sample_id.clone() };
        let remembered = self.memory().get(&key).cloned();
        let settled = remembered.unwrap_or_else(|| {
            let fresh = Settled { digest, outcome: outcome_of(sample, json_keys) };
            // Another call may have settled the same sample meanwhile; then its answer is the answer.
            self.memory().get_or_insert(key, || fresh).clone()
        });
        if settled.digest == digest {
            settled.outcome
        } else {
            let message = "this sample_id came with other content before".to_owned();
            Outcome::Failed(failed("SAMPLE_ID_CLASH", message))
        }
    }

    /// Held for a look or an entry only, never while a sample is judged.
    fn memory(&self) -> MutexGuard<'_, LruCache<SampleKey, Settled>> {
        self.memory.lock().expect("nothing panics while it holds the memory")
    }
}

/// Judges one sample.
fn outcome_of(sample: &Sample, json_keys: &HashSet<&str>) -> Outcome {
    let scored = read_columns(sample, json_keys).and_then(|columns| {
        check_messages(&sample.messages)?;
        reward::judge(&sample.completion, &columns)
    });
    scored.map_or_else(Outcome::Failed, Outcome::Scored)
}

/// Stands for all that a score may depend on: the sample without its group, and which of its columns are JSON.
fn digest_of(sample: &Sample, json_keys: &HashSet<&str>) -> [u8; 32] {
    let content = Sample { group_id: String::new(), group_size: 0, ..sample.clone() };
    let is_json = |key: &&String| json_keys.contains(key.as_str());
    let judged = ScoreRequest {
        json_metadata_keys: content.metadata.keys().filter(is_json).cloned().collect(),
        samples: vec![content],
        ..ScoreRequest::default()
    };
    Sha256::digest(judged.encode_to_vec()).into()
}

#[cfg(test)]
pub mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use serde_json::Value;

    use super::*;
    use crate::pb::{ChatMessage, FinishReason};

    /// A well-formed request of so many samples.
    pub fn request_of(count: usize) -> ScoreRequest {
        let sample = |index| Sample {
            sample_id: format!("sample-{index}"),
            group_id: "group".into(),
            completion: "42.".into(),
            metadata: [("answer".to_owned(), "42".to_owned())].into(),
            ..Sample::default()
        };
        ScoreRequest { run_id: "run".into(), samples: (0..count).map(sample).collect(), ..ScoreRequest::default() }
    }

    fn remembering(samples: usize) -> Service {
        Service::new(NonZeroUsize::new(samples).unwrap())
    }

    async fn outcomes(service: &Service, request: ScoreRequest) -> Vec<Outcome> {
        let response = service.score(Request::new(request)).await.unwrap().into_inner();
        response.results.into_iter().map(|result| result.outcome.unwrap()).collect()
    }

    fn code(outcome: &Outcome) -> &str {
        match outcome {
            Outcome::Failed(failure) => &failure.code,
            _ => "",
        }
    }

    #[test]
    fn every_golden_sample_has_its_reward_to_the_last_bit() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../tests/reward_server/examples/golden/vectors.json");
        let vectors: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert_eq!(vectors.len(), 200);
        for vector in &vectors {
            let text = |value: &Value| value.as_str().unwrap().to_owned();
            let metadata = vector["metadata"].as_object().unwrap().iter();
            let sample = Sample {
                completion: text(&vector["completion"]),
                metadata: metadata.map(|(key, value)| (key.clone(), text(value))).collect(),
                ..Sample::default()
            };
            let json_keys = vector["json_metadata_keys"].as_array().unwrap().iter();
            let outcome = outcome_of(&sample, &json_keys.map(|key| key.as_str().unwrap()).collect());
            match (&outcome, vector["outcome"].as_str().unwrap()) {
                (Outcome::Failed(failure), "failed") => assert_eq!(failure.code, vector["code"], "{vector}"),
                (Outcome::Scored(scored), "scored") => {
                    // The bits tell 0 from -0, which == does not.
                    let bits = |value: &Value| value.as_f64().unwrap().to_bits();
                    assert_eq!(scored.reward.unwrap().to_bits(), bits(&vector["reward"]), "{vector}");
                    let want = vector["components"].as_object().unwrap().iter();
                    let want: BTreeMap<_, _> = want.map(|(name, value)| (name.clone(), bits(value))).collect();
                    let got = scored.components.iter().map(|(name, value)| (name.clone(), value.to_bits()));
                    assert_eq!(got.collect::<BTreeMap<_, _>>(), want, "{vector}");
                }
                _ => panic!("{vector}: {outcome:?}"),
            }
        }
    }

    #[tokio::test]
    async fn a_repeated_sample_gets_the_same_answer_in_any_company() {
        let service = remembering(10);
        let first = outcomes(&service, request_of(2)).await;
        let mut again = request_of(3);
        again.samples.swap(0, 2);
        again.samples[1].group_id = "another".into();
        again.samples[1].group_size = 7;
        assert_eq!(outcomes(&service, again).await[1], first[1]);
    }

    #[tokio::test]
    async fn other_content_under_a_known_id_is_a_clash_and_replaces_nothing() {
        let changes: [fn(&mut ScoreRequest); 8] = [
            |r| r.samples[0].completion = "43".into(),
            |r| r.samples[0].prompt = "6 × 7".into(),
            |r| _ = r.samples[0].metadata.insert("source".into(), "a".into()),
            |r| r.samples[0].metadata.clear(),
            |r| r.json_metadata_keys.push("answer".into()),
            |r| r.samples[0].finish_reason = FinishReason::Eos.into(),
            |r| r.samples[0].messages.push(ChatMessage { role: "user".into(), ..ChatMessage::default() }),
            |r| r.samples[0].completion_token_ids.push(7),
        ];
        for (index, change) in changes.iter().enumerate() {
            let service = remembering(10);
            let first = outcomes(&service, request_of(1)).await;
            let mut other = request_of(1);
            change(&mut other);
            assert_eq!(code(&outcomes(&service, other).await[0]), "SAMPLE_ID_CLASH", "change {index}");
            assert_eq!(outcomes(&service, request_of(1)).await, first, "change {index}");
        }
    }

    #[tokio::test]
    async fn ids_of_another_run_and_keys_that_no_sample_has_are_no_clash() {
        let service = remembering(10);
        outcomes(&service, request_of(1)).await;
        let mut same_again = request_of(1);
        same_again.json_metadata_keys.push("absent".into());
        let mut other_run = request_of(1);
        other_run.run_id = "another".into();
        other_run.samples[0].completion = "43".into();
        for request in [same_again, other_run] {
            assert!(matches!(outcomes(&service, request).await[0], Outcome::Scored(_)));
        }
    }

    #[tokio::test]
    async fn the_memory_forgets_the_least_recently_used() {
        let service = remembering(2);
        for index in [0, 1, 0, 2] {
            let mut request = request_of(3);
            request.samples = vec![request.samples.swap_remove(index)];
            outcomes(&service, request).await;
        }
        assert_eq!(service.memory().len(), 2);
        let mut changed = request_of(2);
        changed.samples.iter_mut().for_each(|sample| sample.completion = "43".into());
        let outcomes = outcomes(&service, changed).await;
        assert_eq!(code(&outcomes[0]), "SAMPLE_ID_CLASH");
        assert!(matches!(outcomes[1], Outcome::Scored(_)), "{outcomes:?}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn one_of_many_concurrent_contents_wins() {
        let service = Arc::new(remembering(10));
        let calls: Vec<_> = (0..32)
            .map(|index| {
                let service = Arc::clone(&service);
                let mut request = request_of(1);
                request.samples[0].completion = index.to_string();
                tokio::spawn(async move { outcomes(&service, request).await.remove(0) })
            })
            .collect();
        let mut scored = 0;
        for call in calls {
            match call.await.unwrap() {
                Outcome::Scored(_) => scored += 1,
                other => assert_eq!(code(&other), "SAMPLE_ID_CLASH"),
            }
        }
        assert_eq!(scored, 1);
    }

    #[tokio::test]
    async fn a_call_that_nobody_waits_for_stops_between_two_samples() {
        let service = remembering(10);
        tokio::select! {
            biased;
            _ = service.score(Request::new(request_of(5))) => panic!("it never awaits"),
            // Ready when the call awaits for the second time, with one sample judged.
            () = tokio::task::yield_now() => {}
        }
        assert!(service.memory().len() < 5);
    }
}
