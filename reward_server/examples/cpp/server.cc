// The process: `LISTEN=127.0.0.1:50052 reward` serves the reward until SIGTERM or SIGINT.
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <string>

#include "service.h"

namespace {

constexpr std::size_t kRememberedSamples = 65'536;
constexpr auto kGrace = std::chrono::seconds(10);

// Both signals are kept for sigwait. Before the first thread starts: threads inherit it.
sigset_t BlockStopSignals() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  return signals;
}

}  // namespace

int main() {
  const sigset_t stop_signals = BlockStopSignals();
  const char* variable = std::getenv("LISTEN");
  const std::string listen = variable != nullptr ? variable : "127.0.0.1:50052";

  // Both are for the builders that come after. Health starts with "" SERVING: the process is alive.
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();

  example::RewardService service(kRememberedSamples);
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort(listen, grpc::InsecureServerCredentials(), &port);
  // Otherwise a second server on the same port would start without a word, and get half of the calls.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.SetMaxReceiveMessageSize(example::kMaxRequestBytes);
  builder.RegisterService(&service);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr) {
    std::cerr << "can't listen on " << listen << ": is another process there?\n";
    return EXIT_FAILURE;
  }
  server->GetHealthCheckService()->SetServingStatus(rlhf::reward::v1::RewardService::service_full_name(), true);
  std::cout << "listening on " << listen.substr(0, listen.rfind(':')) << ':' << port << std::endl;

  int signal = 0;
  sigwait(&stop_signals, &signal);
  // Says NOT_SERVING for every service.
  server->GetHealthCheckService()->Shutdown();
  // Refuses new calls at once. The grace is bounded because an open health Watch never ends by itself.
  server->Shutdown(std::chrono::system_clock::now() + kGrace);
  server->Wait();
  return EXIT_SUCCESS;
}
