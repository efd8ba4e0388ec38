#include "sample.h"

#include <fmt/format.h>
#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <openssl/evp.h>

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

namespace example {
namespace {

using nlohmann::json;
using rlhf::reward::v1::ContentPart;
using rlhf::reward::v1::Sample;

// Not protobuf's own JSON: it takes 'a', {a: 1} and [1,] as well.
json ParseJson(const std::string& text, const std::string& path) {
  // These two the library would let pass: it reads NUL as the end of the text, and skips a byte order mark.
  const bool tricky = text.find('\0') != std::string::npos || text.starts_with("\xEF\xBB\xBF");
  json value = tricky ? json(json::value_t::discarded) : json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (value.is_discarded()) throw Unjudgeable("INVALID_METADATA", path + " is not JSON");
  return value;
}

}  // namespace

void Check(const Sample& sample, const JsonKeys& json_keys) {
  for (const auto& [key, text] : sample.metadata()) {
    if (json_keys.contains(key)) ParseJson(text, fmt::format("metadata[\"{}\"]", Head(key)));
  }
  for (int index = 0; index < sample.messages_size(); ++index) {
    const auto& message = sample.messages(index);
    const std::string path = fmt::format("messages[{}]", index);
    if (std::ranges::any_of(message.parts(),
                            [](const auto& part) { return part.kind_case() == ContentPart::KIND_NOT_SET; })) {
      throw Unjudgeable("UNKNOWN_CONTENT", path + " has a part of a kind that this server does not know");
    }
    if (!message.extra_json().empty() && !ParseJson(message.extra_json(), path + ".extra_json").is_object()) {
      throw Unjudgeable("INVALID_METADATA", path + ".extra_json is not a JSON object");
    }
  }
}

std::string ReferenceAnswer(const Sample& sample, std::string_view column, const JsonKeys& json_keys) {
  const Unjudgeable missing("MISSING_METADATA", fmt::format("the reward needs the column \"{}\"", column));
  const auto found = sample.metadata().find(column);
  if (found == sample.metadata().end()) throw missing;
  const std::string& text = found->second;
  if (!json_keys.contains(column)) return text;
  const json value = ParseJson(text, fmt::format("metadata[\"{}\"]", column));
  // JSON null says the same as an absent key: the row has no value.
  if (value.is_null()) throw missing;
  return value.is_string() ? value.get<std::string>() : text;
}

std::string Fingerprint(const Sample& sample, const JsonKeys& json_keys) {
  // One message for both, so that no two different contents make the same bytes.
  rlhf::reward::v1::ScoreRequest relevant;
  Sample& content = *relevant.add_samples() = sample;
  content.clear_group_id();
  content.clear_group_size();
  for (const std::string& key : json_keys) {
    if (sample.metadata().contains(key)) relevant.add_json_metadata_keys(key);
  }
  std::string bytes;
  {
    google::protobuf::io::StringOutputStream stream(&bytes);
    google::protobuf::io::CodedOutputStream coded(&stream);
    // Maps have no order; deterministic gives them one.
    coded.SetSerializationDeterministic(true);
    relevant.SerializeToCodedStream(&coded);
  }
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest;
  unsigned int size = 0;
  if (EVP_Digest(bytes.data(), bytes.size(), digest.data(), &size, EVP_sha256(), nullptr) != 1) {
    throw std::runtime_error("OpenSSL has no SHA-256");
  }
  return std::string(digest.begin(), digest.begin() + size);
}

std::string_view Head(std::string_view text, std::size_t size) {
  if (text.size() <= size) return text;
  while (size > 0 && (static_cast<unsigned char>(text[size]) & 0xC0) == 0x80) --size;
  return text.substr(0, size);
}

}  // namespace example
