#include "cuda/decoder_step/attention.cu"
#include "cuda/decoder_step/elementwise.cu"
#include "driver.h"

namespace decoder_step = losa::decoder_step;
using losa::FloatType;

template <class... T>
void write_late(std::vector<T>&... memory) {
  (emulator::write_late(memory), ...);
}

// norm TYPE ROWS COLUMNS VECTORS EPS_IN_MILLIONTHS: x, update (or no file), weight -> x, normed
void norm(const Driver& driver) {
  const auto type = static_cast<FloatType>(driver[0]);
  auto x = driver.read<uint8_t>("x"), update = driver.read<uint8_t>("update");
  const auto weight = driver.read<uint8_t>("weight");
  std::vector<uint8_t> out(x.size(), 0xa5);
  write_late(x, update, out);
  const decoder_step::AddRmsNorm task{.x = x.data(),
                                      .update = data_or_null(update),
                                      .weight = weight.data(),
                                      .out = out.data(),
                                      .rows = driver[1],
                                      .columns = static_cast<int>(driver[2]),
                                      .eps = 1e-6f * static_cast<float>(driver[4])};
  decoder_step::launch_add_rms_norm(type, task, driver[3] != 0, nullptr);
  driver.write("x", x);
  driver.write("normed", out);
}

// silu TYPE ROWS COLUMNS VECTORS: gate_up -> out
void silu(const Driver& driver) {
  const auto type = static_cast<FloatType>(driver[0]);
  auto gate_up = driver.read<uint8_t>("gate_up");
  std::vector<uint8_t> out(gate_up.size() / 2, 0xa5);
  write_late(gate_up, out);
  const decoder_step::GatedSilu task{
      .gate_up = gate_up.data(), .out = out.data(), .rows = driver[1], .columns = static_cast<int>(driver[2])};
  decoder_step::launch_gated_silu(type, task, driver[3] != 0, nullptr);
  driver.write("out", out);
}

// rotate TYPE QUERIES KEYS SIZE PLACES EPS_IN_MILLIONTHS:
// heads, cos, sin, position, cache, q_norm and k_norm (or no files) -> rotated, cache
void rotate(const Driver& driver) {
  const auto type = static_cast<FloatType>(driver[0]);
  const auto cos = driver.read<uint8_t>("cos"), sin = driver.read<uint8_t>("sin");
  auto position = driver.read<int64_t>("position");
  auto heads = driver.read<uint8_t>("heads"), cache = driver.read<uint8_t>("cache"),
       q_norm = driver.read<uint8_t>("q_norm");
  auto k_norm = driver.read<uint8_t>("k_norm");
  std::vector<uint8_t> rotated(driver[1] * driver[3] * losa::float_type_size(type), 0xa5);
  write_late(heads, position, cache, rotated);
  const decoder_step::Rotation task{.heads = heads.data(),
                                    .cos = cos.data(),
                                    .sin = sin.data(),
                                    .position = position.data(),
                                    .q_norm = data_or_null(q_norm),
                                    .k_norm = data_or_null(k_norm),
                                    .eps = 1e-6f * static_cast<float>(driver[5]),
                                    .rotated = rotated.data(),
                                    .cache = cache.data(),
                                    .queries = static_cast<int>(driver[1]),
                                    .keys = static_cast<int>(driver[2]),
                                    .size = static_cast<int>(driver[3]),
                                    .places = driver[4]};
  decoder_step::launch_rotate_and_store(type, task, nullptr);
  driver.write("rotated", rotated);
  driver.write("cache", cache);
}

// attend TYPE (not fp16) QUERIES KEYS SIZE ROOM PLACES MULTIPROCESSORS: q, cache, position, scale -> out, finished
void attend(const Driver& driver) {
  const auto type = static_cast<FloatType>(driver[0]);
  const int64_t queries = driver[1], keys = driver[2], size = driver[3], room = driver[4];
  const auto places = static_cast<int>(driver[5]);
  auto q = driver.read<uint8_t>("q"), cache = driver.read<uint8_t>("cache");
  auto position = driver.read<int64_t>("position");
  const auto scale = driver.read<float>("scale");
  const int heads = static_cast<int>(keys) * decoder_step::sets_of(static_cast<int>(queries), static_cast<int>(keys));
  const int splits = decoder_step::splits_for(heads, places, static_cast<int>(driver[6]));
  std::vector<uint8_t> out(q.size(), 0xa5);
  std::vector<float> parts(queries * splits * size, NAN), weights(queries * splits * 2, NAN);
  std::vector<int> finished(queries, 0);
  const decoder_step::Attention task{.q = q.data(),
                                     .cache = cache.data(),
                                     .position = position.data(),
                                     .out = out.data(),
                                     .parts = parts.data(),
                                     .weights = weights.data(),
                                     .finished = finished.data(),
                                     .queries = static_cast<int>(queries),
                                     .keys = static_cast<int>(keys),
                                     .size = static_cast<int>(size),
                                     .room = room,
                                     .places = places,
                                     .scale = scale[0] * static_cast<float>(M_LOG2E)};
  // Twice: the counters must be as they were.
  const auto launch = type == FloatType::kFloat ? decoder_step::launch_attention<FloatType::kFloat>
                                                : decoder_step::launch_attention<FloatType::kBFloat16>;
  for (int turn = 0; turn < 2; ++turn) {
    write_late(q, cache, position, out, parts, weights, finished);
    launch(task, splits, nullptr);
  }
  driver.write("out", out);
  driver.write("finished", finished);
}

int main(int argc, char** argv) {
  const Driver driver(argc, argv);
  if (driver.command == "norm") norm(driver);
  if (driver.command == "silu") silu(driver);
  if (driver.command == "rotate") rotate(driver);
  if (driver.command == "attend") attend(driver);
}
