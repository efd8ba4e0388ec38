//! The reward `answer` as a process that serves reward.proto and nothing else.

mod request;
mod reward;
mod sample;
mod service;

mod pb {
    tonic::include_proto!("rlhf.reward.v1");
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/reward.binpb"));
}

use std::env;
use std::error::Error;
use std::num::NonZeroUsize;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;

use pb::reward_service_server::RewardServiceServer;
use service::{MAX_REQUEST_BYTES, Service};

const DEFAULT_ADDRESS: &str = "127.0.0.1:50052";
/// Beyond its reward, a sample costs its two ids and a digest: about 1 KiB at most, so 64 MiB in all.
const REMEMBERED_SAMPLES: NonZeroUsize = NonZeroUsize::new(65_536).unwrap();
const GRACE: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let address = env::var("LISTEN").ok().filter(|address| !address.is_empty());
    let address = address.as_deref().unwrap_or(DEFAULT_ADDRESS);
    let listener = TcpListener::bind(address).await.map_err(|error| format!("cannot listen on {address}: {error}"))?;
    serve(listener, stop, GRACE).await
}

/// Answers calls until `stop`, and then gives those in flight the time of grace to finish.
async fn serve(listener: TcpListener, stop: impl Future<Output = ()>, grace: Duration) -> Result<(), Box<dyn Error>> {
    let address = listener.local_addr()?;
    let rewards = RewardServiceServer::new(Service::new(REMEMBERED_SAMPLES));
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(pb::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    // "" says that the process is alive and stays SERVING to the end; the service's name says that it judges.
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<RewardServiceServer<Service>>().await;

    let (begin_drain, drain_begun) = oneshot::channel();
    let stop = async {
        stop.await;
        health.set_not_serving::<RewardServiceServer<Service>>().await;
        // Nobody listens only if the server has ended by itself.
        let _ = begin_drain.send(());
    };
    let server = Server::builder()
        .add_service(rewards.max_decoding_message_size(MAX_REQUEST_BYTES))
        .add_service(health_service)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), stop);
    println!("listening on {address}");
    tokio::select! {
        ended = server => Ok(ended?),
        // An open health Watch never ends by itself, so the wait must.
        () = async { _ = drain_begun.await; tokio::time::sleep(grace).await } => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tonic::Code;
    use tonic::transport::Channel;
    use tonic_health::pb::HealthCheckRequest;
    use tonic_health::pb::health_check_response::ServingStatus;
    use tonic_health::pb::health_client::HealthClient;

    use super::*;
    use crate::pb::reward_service_client::RewardServiceClient;
    use crate::pb::sample_result::Outcome;
    use crate::service::tests::request_of;

    /// A server on a port of its own that serves until `stop`, and a connection to it.
    async fn start(stop: impl Future<Output = ()> + Send + 'static) -> (tokio::task::JoinHandle<bool>, Channel) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move { serve(listener, stop, Duration::from_millis(100)).await.is_ok() });
        let channel = Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap();
        (server, channel)
    }

    #[tokio::test]
    async fn a_server_describes_itself_and_scores() {
        let (_server, channel) = start(pending()).await;
        let mut rewards = RewardServiceClient::new(channel);
        let info = rewards.get_reward_info(pb::GetRewardInfoRequest::default()).await.unwrap().into_inner();
        assert_eq!((info.name.as_str(), info.max_samples), ("answer", 256));
        let results = rewards.score(request_of(1)).await.unwrap().into_inner().results;
        assert!(matches!(&results[0].outcome, Some(Outcome::Scored(scored)) if scored.reward == Some(1.25)));
    }

    #[tokio::test]
    async fn a_request_of_more_bytes_than_declared_is_refused() {
        let (_server, channel) = start(pending()).await;
        let mut request = request_of(1);
        request.samples[0].prompt = "x".repeat(MAX_REQUEST_BYTES);
        let refusal = RewardServiceClient::new(channel).score(request).await.unwrap_err();
        assert_eq!(refusal.code(), Code::OutOfRange);
    }

    #[tokio::test]
    async fn a_drain_tells_watchers_and_is_not_held_up_by_them() {
        let (signal, signalled) = oneshot::channel::<()>();
        let (server, channel) = start(async { _ = signalled.await }).await;
        let request = HealthCheckRequest { service: "rlhf.reward.v1.RewardService".into() };
        let mut watch = HealthClient::new(channel).watch(request).await.unwrap().into_inner();
        assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
        signal.send(()).unwrap();
        assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
        assert!(server.await.unwrap());
    }
}
