#include "io/checkpoint.h"

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "io/testing.h"

namespace octavo {
namespace {

namespace fs = std::filesystem;

const std::vector<TestTensor>& SmallTensors() {
  static const std::vector<TestTensor> tensors = {
      MakeTestTensor<float>("matrix", "F32", {2, 3}, {1, 2, 3, 4, 5, 6}),
      MakeTestTensor<uint16_t>("vector", "BF16", {4}, {0x3F80, 0x4000, 0x4040, 0x4080}),
      MakeTestTensor<float>("scalar", "F32", {}, {7}),
      MakeTestTensor<uint8_t>("codes", "F8_E4M3", {2, 2}, {1, 2, 3, 4}),
      MakeTestTensor<float>("empty", "F32", {0, 5}, {}),
  };
  return tensors;
}

std::string Parse(std::string_view bytes) {
  return ErrorMessage([&] { ParseSafetensors(bytes, "file"); });
}

TEST(Checkpoint, AFolderHasTheLastNameOfItsPath) {
  for (const char* path : {"/a/b", "/a/b/", "/a/./b//", "/a/b/c/.."})
    EXPECT_EQ(FolderName(path), "b") << path;
  EXPECT_EQ(FolderName("."), fs::current_path().filename());
}

TEST(Checkpoint, ReadsOneFile) {
  const TempFolder folder;
  folder.Write("model.safetensors", SafetensorsFile(SmallTensors()));
  const Checkpoint checkpoint = Checkpoint::Open(folder.path());
  ASSERT_EQ(checkpoint.tensors().size(), 5u);
  const Tensor& matrix = *checkpoint.Find("matrix");
  EXPECT_EQ(ShapeString(matrix), "[2, 3] float32");
  EXPECT_EQ(matrix.Row<float>(1)[2], 6);
  EXPECT_EQ(ShapeString(*checkpoint.Find("scalar")), "[1] float32");
  EXPECT_EQ(static_cast<const float*>(checkpoint.Find("scalar")->data)[0], 7);
  EXPECT_EQ(checkpoint.Find("empty")->size(), 0);
  EXPECT_EQ(checkpoint.Find("codes")->Row<uint8_t>(1)[0], 3);
  EXPECT_EQ(checkpoint.Find("nothing"), nullptr);
}

TEST(Checkpoint, TensorsOutlivedByAMovedCheckpoint) {
  const TempFolder folder;
  Checkpoint a =
      Checkpoint::OpenFile(folder.Write("x.safetensors", SafetensorsFile(SmallTensors())));
  const Tensor matrix = *a.Find("matrix");
  const Checkpoint b = std::move(a);
  EXPECT_EQ(matrix.Row<float>(0)[1], 2);
}

TEST(Checkpoint, DataThatIsNotAlignedIsMadeSo) {
  const std::vector<TestTensor> tensors = {MakeTestTensor<uint8_t>("a", "U8", {3}, {1, 2, 3}),
                                           MakeTestTensor<float>("b", "F32", {2}, {4, 5})};
  const TempFolder folder;
  const Checkpoint checkpoint =
      Checkpoint::OpenFile(folder.Write("x.safetensors", SafetensorsFile(tensors)));
  const Tensor& b = *checkpoint.Find("b");
  EXPECT_EQ(reinterpret_cast<uintptr_t>(b.data) % alignof(float), 0u);
  EXPECT_EQ(b.Row<float>(0)[1], 5);
}

// The small tensors over two files, the second reached through a link, as in the Hugging Face
// cache.
void WriteShards(const TempFolder& folder) {
  const std::vector<TestTensor>& all = SmallTensors();
  folder.Write("model-00001-of-00002.safetensors", SafetensorsFile({all[0], all[1]}));
  fs::create_directory(folder.path() / "blobs");
  folder.Write("blobs/abc", SafetensorsFile({all[2], all[3], all[4]}));
  fs::create_symlink("blobs/abc", folder.path() / "model-00002-of-00002.safetensors");
}

const char kIndex[] = R"({"metadata": {"total_size": 44}, "weight_map": {
    "matrix": "model-00001-of-00002.safetensors", "vector": "model-00001-of-00002.safetensors",
    "scalar": "model-00002-of-00002.safetensors", "codes": "model-00002-of-00002.safetensors",
    "empty": "model-00002-of-00002.safetensors"}})";

TEST(Checkpoint, ShardsAreTheSameAsOneFile) {
  const TempFolder one, many;
  one.Write("model.safetensors", SafetensorsFile(SmallTensors()));
  WriteShards(many);
  many.Write("model.safetensors.index.json", kIndex);
  const Checkpoint a = Checkpoint::Open(one.path()), b = Checkpoint::Open(many.path());
  ASSERT_EQ(a.tensors().size(), b.tensors().size());
  for (const auto& [name, tensor] : a.tensors()) {
    const Tensor* other = b.Find(name);
    ASSERT_NE(other, nullptr) << name;
    EXPECT_EQ(ShapeString(tensor), ShapeString(*other));
    EXPECT_EQ(a.FileOf(name), one.path() / "model.safetensors");
    EXPECT_EQ(std::memcmp(tensor.data, other->data, tensor.size() * SizeOf(tensor.dtype)), 0)
        << name;
  }
}

TEST(Checkpoint, TensorsKnowTheirFile) {
  const TempFolder folder;
  WriteShards(folder);
  folder.Write("model.safetensors.index.json", kIndex);
  const Checkpoint checkpoint = Checkpoint::Open(folder.path());
  EXPECT_EQ(checkpoint.FileOf("matrix"), folder.path() / "model-00001-of-00002.safetensors");
  EXPECT_EQ(checkpoint.FileOf("codes"), folder.path() / "model-00002-of-00002.safetensors");
  EXPECT_EQ(checkpoint.FileOf("none"), folder.path());
}

TEST(Checkpoint, IndexAndShardsMustAgree) {
  struct Case {
    const char *find, *replace, *message;
  };
  const Case cases[] = {
      {R"("matrix": "model-00001-of-00002.safetensors")",
       R"("matrix": "../model-00001-of-00002.safetensors")",
       "expected the name of a .safetensors file in this folder"},
      {R"("matrix": "model-00001-of-00002.safetensors")", R"("matrix": "/etc/passwd")",
       "'matrix': expected the name of a .safetensors file in this folder, found '/etc/passwd'"},
      {R"("matrix": "model-00001-of-00002.safetensors")", R"("matrix": "blobs/abc.safetensors")",
       "in this folder"},
      {R"("matrix": "model-00001-of-00002.safetensors")", R"("matrix": "..\\x.safetensors")",
       "in this folder"},
      {R"("matrix": "model-00001-of-00002.safetensors")",
       R"("matrix": "model-00001-of-00002.safetensors\u0000")", "in this folder"},
      {R"("matrix": "model-00001-of-00002.safetensors")", R"("matrix": "..")", "in this folder"},
      {R"("matrix": "model-00001-of-00002.safetensors")", R"("matrix": "")", "in this folder"},
      {R"("matrix": "model-00001-of-00002.safetensors")", R"("matrix": 3)",
       "expected a file name, found 3"},
      {R"("matrix": "model-00001-of-00002.safetensors")", R"("matrix": "a.safetensors")",
       "cannot open"},
      {R"("matrix": "model-00001-of-00002.safetensors")",
       R"("matrix": "model-00002-of-00002.safetensors")", "not in weight_map"},
      {R"("matrix": "model-00001-of-00002.safetensors", )", "",
       "tensor 'matrix' is not in weight_map"},
      {R"("matrix")", R"("matrix2": "model-00001-of-00002.safetensors", "matrix")",
       "tensor 'matrix2' is not in"},
      {R"("weight_map": {)", R"("weight_map": [{)", "not valid JSON"},
      {R"("weight_map")", R"("weights")", "weight_map: expected an object"},
  };
  for (const Case& c : cases) {
    const TempFolder folder;
    WriteShards(folder);
    std::string index = kIndex;
    ASSERT_NE(index.find(c.find), index.npos);
    index.replace(index.find(c.find), std::strlen(c.find), c.replace);
    folder.Write("model.safetensors.index.json", index);
    const std::string message = ErrorMessage([&] { Checkpoint::Open(folder.path()); });
    EXPECT_TRUE(message.starts_with(folder.path().string())) << message;
    EXPECT_NE(message.find(c.message), message.npos) << c.replace << " -> " << message;
  }
}

TEST(Checkpoint, OneTensorInTwoShards) {
  const TempFolder folder;
  folder.Write("a.safetensors", SafetensorsFile(SmallTensors()));
  folder.Write("b.safetensors", SafetensorsFile({SmallTensors()[0]}));
  folder.Write(
      "model.safetensors.index.json",
      R"({"weight_map": {"vector": "a.safetensors", "scalar": "a.safetensors", "codes": "a.safetensors",
                   "empty": "a.safetensors", "matrix": "b.safetensors"}})");
  EXPECT_NE(ErrorMessage([&] { Checkpoint::Open(folder.path()); }).find("tensor 'matrix'"),
            std::string::npos);
}

TEST(Checkpoint, NothingThere) {
  const TempFolder folder;
  EXPECT_NE(
      ErrorMessage([&] { Checkpoint::Open(folder.path()); }).find("neither model.safetensors nor"),
      std::string::npos);
  fs::create_symlink("purged", folder.path() / "model.safetensors");
  EXPECT_NE(
      ErrorMessage([&] { Checkpoint::Open(folder.path()); }).find("model.safetensors: cannot open"),
      std::string::npos);
}

TEST(Safetensors, RefusesBadHeaders) {
  struct Case {
    const char *header, *message;
  };
  const std::string data(12, '\0');
  const Case cases[] = {
      {R"([])", "expected an object, found an array"},
      {R"({"a": 1})", "tensor 'a': expected an object, found 1"},
      {R"({"a": {"shape": [3], "data_offsets": [0, 12]}})", "tensor 'a': dtype is missing"},
      {R"({"a": {"dtype": "F32", "data_offsets": [0, 12]}})", "tensor 'a': shape is missing"},
      {R"({"a": {"dtype": "F32", "shape": [3]}})", "tensor 'a': data_offsets is missing"},
      {R"({"a": {"dtype": 1, "shape": [3], "data_offsets": [0, 12]}})",
       "dtype: expected a string, found 1"},
      {R"({"a": {"dtype": "F31", "shape": [3], "data_offsets": [0, 12]}})",
       "dtype 'F31' is not supported"},
      {R"({"a": {"dtype": "F32", "shape": 3, "data_offsets": [0, 12]}})",
       "shape: expected an array, found 3"},
      {R"({"a": {"dtype": "F32", "shape": [-3], "data_offsets": [0, 12]}})",
       "shape: expected integers"},
      {R"({"a": {"dtype": "F32", "shape": [3.0], "data_offsets": [0, 12]}})",
       "shape: expected integers"},
      {R"({"a": {"dtype": "F32", "shape": ["3"], "data_offsets": [0, 12]}})",
       "shape: expected integers"},
      {R"({"a": {"dtype": "F32", "shape": [1, 1, 1, 1, 3], "data_offsets": [0, 12]}})",
       "at most 4 dimensions"},
      {R"({"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 12]}})",
       "fewer elements"},
      {R"({"a": {"dtype": "F32", "shape": [9223372036854775807], "data_offsets": [0, 12]}})",
       "fewer elements"},
      {R"({"a": {"dtype": "F32", "shape": [18446744073709551615], "data_offsets": [0, 12]}})",
       "shape: expected"},
      {R"({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}})",
       "expected 16 bytes for [4] float32"},
      {R"({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 12]}})",
       "expected 8 bytes for [2] float32"},
      {R"({"a": {"dtype": "F32", "shape": [3], "data_offsets": [12, 0]}})", "expected 12 bytes"},
      {R"({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 13]}})",
       "data_offsets: expected integers"},
      {R"({"a": {"dtype": "F32", "shape": [3], "data_offsets": [-12, 0]}})",
       "data_offsets: expected integers"},
      {R"({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0]}})",
       "data_offsets: expected two integers"},
      {R"({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12], "x": 1}})",
       "unknown field 'x'"},
      {R"({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
           "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}})",
       "tensor 'b': data_offsets: expected to begin at 8"},
      {R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
           "b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]}})",
       "tensor 'b': data_offsets: expected to begin at 4"},
      {R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}})",
       "expected to begin at 0"},
      {R"({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})",
       "expected 8 bytes of tensor data, found 12"},
      {R"({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
           "a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}})",
       "'a' is given twice"},
      {R"({"__metadata__": {"format": 1}})", "__metadata__: expected an object of strings"},
      {R"({"__metadata__": [], "a": {}})", "__metadata__"},
      {R"({"a": {"dtype": "F32", "shape": [[[[[3]]]]], "data_offsets": [0, 12]}})",
       "nested deeper"},
      {R"({"a")", "not valid JSON"},
      {"", "not valid JSON"},
      {"{\"\xff\": {}}", "not valid JSON"},
  };
  for (const Case& c : cases) {
    const std::string message = Parse(SafetensorsBytes(c.header, data));
    EXPECT_TRUE(message.starts_with("file")) << c.header << " -> " << message;
    EXPECT_NE(message.find(c.message), message.npos) << c.header << " -> " << message;
    EXPECT_EQ(message.find('\n'), message.npos) << message;
  }
}

TEST(Safetensors, EveryTruncationIsRefused) {
  const std::string file = SafetensorsFile(SmallTensors());
  EXPECT_EQ(Parse(file), "");
  for (size_t size = 0; size < file.size(); ++size)
    EXPECT_NE(Parse(file.substr(0, size)), "") << size;
  EXPECT_NE(Parse(file + "x").find("bytes of tensor data"), std::string::npos);
}

TEST(Safetensors, HugeLengthsAreRefused) {
  for (const uint64_t length :
       {uint64_t{1} << 20, uint64_t{100} << 20, uint64_t{1} << 63, ~uint64_t{0}}) {
    std::string file = SafetensorsFile(SmallTensors());
    std::memcpy(file.data(), &length, sizeof(length));
    EXPECT_NE(Parse(file).find("header of"), std::string::npos) << length;
  }
}

// Whatever is done to a valid file: an Error, or tensors that lie within it.
TEST(Safetensors, RandomMutations) {
  const std::string file = SafetensorsFile(SmallTensors());
  std::mt19937 random(1);
  const auto below = [&](size_t n) { return random() % n; };
  const std::string_view pieces[] = {"0", "-1", "9999999999", "[", "]",       "{",
                                     "}", "\"", ",",          ":", "\"F32\"", "\xff"};
  int accepted = 0;
  for (int i = 0; i < 10000; ++i) {
    std::string bytes = file;
    for (size_t changes = 1 + below(3); changes > 0; --changes) {
      const size_t at =
          below(4) == 0 ? below(bytes.size()) : 8 + below(std::min<size_t>(bytes.size(), 300) - 8);
      switch (below(4)) {
        case 0:
          bytes[at] = static_cast<char>(random());
          break;
        case 1:
          bytes.erase(at, 1 + below(4));
          break;
        case 2:
          bytes.insert(at, pieces[below(std::size(pieces))]);
          break;
        case 3:
          bytes.replace(at, 1, pieces[below(std::size(pieces))]);
          break;
      }
    }
    try {
      for (const SafetensorsEntry& entry : ParseSafetensors(bytes, "file")) {
        const auto* begin = static_cast<const char*>(entry.tensor.data);
        ASSERT_GE(begin, bytes.data());
        ASSERT_LE(begin + entry.tensor.size() * static_cast<int64_t>(SizeOf(entry.tensor.dtype)),
                  bytes.data() + bytes.size());
      }
      ++accepted;
    } catch (const Error& error) {
      ASSERT_EQ(error.message().find('\n'), std::string::npos) << error.message();
    }
  }
  EXPECT_GT(accepted, 0);     // names and data may change
  EXPECT_LT(accepted, 9000);  // most changes must not pass
}

}  // namespace
}  // namespace octavo
