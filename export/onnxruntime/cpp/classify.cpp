// Prints the five best labels of a picture: classify FOLDER PICTURE
//
// FOLDER was exported with --preprocess in-graph, so the model itself normalises; PICTURE has the model's input size.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <numeric>
#include <regex>
#include <stdexcept>
#include <string>
#include <vector>

#include <onnxruntime_cxx_api.h>
#define STB_IMAGE_IMPLEMENTATION
#include <stb_image.h>

std::vector<std::string> read_labels(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error(path + " does not exist; name a folder that sdzoo export wrote");
  const std::string text(std::istreambuf_iterator<char>(file), {});
  const std::regex quoted(R"re("((?:[^"\\]|\\.)*)")re");
  std::vector<std::string> labels;
  for (std::sregex_iterator match(text.begin(), text.end(), quoted), end; match != end; ++match) labels.push_back((*match)[1]);
  return labels;
}

void classify(const std::string& folder, const std::string& picture) {
  const std::vector<std::string> labels = read_labels(folder + "/labels.json");
  Ort::Env env(ORT_LOGGING_LEVEL_ERROR);
  Ort::Session session(env, (folder + "/model.onnx").c_str(), Ort::SessionOptions());
  const Ort::TypeInfo type = session.GetInputTypeInfo(0);
  std::vector<int64_t> shape = type.GetTensorTypeAndShapeInfo().GetShape();  // batch, height, width, channels
  if (type.GetTensorTypeAndShapeInfo().GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8)
    throw std::runtime_error(folder + " takes normalised floats; export it with --preprocess in-graph");

  int width, height, channels;
  if (!stbi_info(picture.c_str(), &width, &height, &channels)) throw std::runtime_error(picture + " is not a picture");
  const auto size = [](int64_t w, int64_t h) { return std::to_string(w) + "x" + std::to_string(h); };
  if (height != shape[1] || width != shape[2])
    throw std::runtime_error(picture + " is " + size(width, height) + "; the model takes " + size(shape[2], shape[1]));
  const std::unique_ptr<stbi_uc, decltype(&stbi_image_free)> pixels(
      stbi_load(picture.c_str(), &width, &height, &channels, static_cast<int>(shape[3])), stbi_image_free);
  if (!pixels) throw std::runtime_error(picture + " cannot be decoded: " + stbi_failure_reason());

  shape[0] = 1;
  const char* const inputs[] = {"images"};
  const char* const outputs[] = {"logits"};
  const Ort::Value input = Ort::Value::CreateTensor<uint8_t>(
      Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault), pixels.get(),
      static_cast<size_t>(shape[1] * shape[2] * shape[3]), shape.data(), shape.size());
  const std::vector<Ort::Value> results = session.Run(Ort::RunOptions(), inputs, &input, 1, outputs, 1);

  const float* logits = results[0].GetTensorData<float>();
  if (results[0].GetTensorTypeAndShapeInfo().GetElementCount() != labels.size())
    throw std::runtime_error(folder + " is damaged: it has not one label a class");
  const float highest = *std::max_element(logits, logits + labels.size());
  const double sum = std::accumulate(logits, logits + labels.size(), 0.0,
                                     [&](double total, float logit) { return total + std::exp(logit - highest); });
  std::vector<size_t> order(labels.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return logits[a] > logits[b]; });
  for (size_t rank = 0; rank < std::min<size_t>(5, order.size()); ++rank)
    std::printf("  %5.1f%%  %s\n", 100 * std::exp(logits[order[rank]] - highest) / sum, labels[order[rank]].c_str());
}

int main(int count, char** arguments) try {
  if (count != 3) throw std::runtime_error("usage: classify FOLDER PICTURE");
  classify(arguments[1], arguments[2]);
} catch (const std::exception& error) {
  std::fprintf(stderr, "error: %s\n", error.what());
  return 2;
}
