// Prints the five best labels of a picture: classify FOLDER PICTURE
//
// FOLDER was exported with --preprocess in-graph, so the model itself normalises; PICTURE has the model's input size.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <regex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <onnxruntime_cxx_api.h>
#define STB_IMAGE_IMPLEMENTATION
#include <stb_image.h>

void check(bool holds, const std::string& otherwise) {
  if (!holds) throw std::runtime_error(otherwise);
}

void classify(const std::string& folder, const std::string& picture) {
  std::ifstream file(folder + "/labels.json");
  check(file.good(), folder + "/labels.json does not exist; name a folder that sdzoo export wrote");
  const std::string text(std::istreambuf_iterator<char>(file), {});
  const std::regex quoted(R"re("((?:[^"\\]|\\.)*)")re");
  const std::vector<std::string> labels(std::sregex_token_iterator(text.begin(), text.end(), quoted, 1), {});

  Ort::Env env(ORT_LOGGING_LEVEL_ERROR);
  Ort::Session session(env, (folder + "/model.onnx").c_str(), Ort::SessionOptions());
  const Ort::TypeInfo type = session.GetInputTypeInfo(0);
  std::vector<int64_t> shape = type.GetTensorTypeAndShapeInfo().GetShape();  // batch, height, width, channels
  check(type.GetTensorTypeAndShapeInfo().GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8,
        folder + " takes normalised floats; export it with --preprocess in-graph");

  int width, height, channels;
  check(stbi_info(picture.c_str(), &width, &height, &channels), picture + " is not a picture");
  const auto size = [](int64_t w, int64_t h) { return std::to_string(w) + "x" + std::to_string(h); };
  check(height == shape[1] && width == shape[2],
        picture + " is " + size(width, height) + "; the model takes " + size(shape[2], shape[1]));
  const std::unique_ptr<stbi_uc, decltype(&stbi_image_free)> pixels(
      stbi_load(picture.c_str(), &width, &height, &channels, static_cast<int>(shape[3])), stbi_image_free);
  if (!pixels) throw std::runtime_error(picture + " cannot be decoded: " + stbi_failure_reason());

  shape[0] = 1;
  const char *const inputs[] = {"images"}, *const outputs[] = {"logits"};
  const Ort::Value input = Ort::Value::CreateTensor<uint8_t>(
      Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault), pixels.get(),
      static_cast<size_t>(shape[1] * shape[2] * shape[3]), shape.data(), shape.size());
  const std::vector<Ort::Value> results = session.Run(Ort::RunOptions(), inputs, &input, 1, outputs, 1);
  check(results[0].GetTensorTypeAndShapeInfo().GetElementCount() == labels.size(),
        folder + " is damaged: it has not one label a class");

  const float* logits = results[0].GetTensorData<float>();
  check(std::all_of(logits, logits + labels.size(), [](float logit) { return std::isfinite(logit); }),
        folder + " gives values that are not finite: it is damaged or untrained");
  std::vector<std::pair<double, size_t>> best;  // minus the logit, so that the first of equals comes first
  for (size_t index = 0; index < labels.size(); ++index) best.emplace_back(-logits[index], index);
  std::sort(best.begin(), best.end());
  double sum = 0;
  for (const auto& one : best) sum += std::exp(best[0].first - one.first);
  for (size_t rank = 0; rank < std::min<size_t>(5, best.size()); ++rank) {
    const auto [minus, index] = best[rank];
    std::printf("  %5.1f%%  %s\n", 100 * std::exp(best[0].first - minus) / sum, labels[index].c_str());
  }
}

int main(int count, char** arguments) try {
  check(count == 3, "usage: classify FOLDER PICTURE");
  classify(arguments[1], arguments[2]);
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 2;
}
