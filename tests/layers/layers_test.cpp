// Who may know whom: reads every #include under src/ and holds it against docs/ARCHITECTURE.md.
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <string>

namespace {

namespace fs = std::filesystem;

const std::map<std::string, std::set<std::string>> kMayKnow = {
    {"base", {}},
    {"io", {"base"}},
    {"text", {"base", "io"}},
    {"kernels", {"base"}},
    {"kv", {"base", "io", "kernels"}},
    {"models", {"base", "io", "kernels", "kv"}},
    {"engine", {"base", "io", "text", "kernels", "kv", "models"}},
    {"eval", {"base", "io", "text", "kernels", "kv", "models", "engine"}},
    {"server", {"base", "io", "text", "engine"}},
    {"cli", {"base", "io", "text", "kernels", "kv", "models", "engine", "eval", "server"}},
};

// The headers of these two build anywhere with a plain compiler.
const std::set<std::string> kStandardLibraryOnly = {"base", "kernels"};

struct Include {
  std::string target;
  bool quoted;
};

std::vector<Include> IncludesOf(const fs::path& file) {
  static const std::regex kInclude(R"(^\s*#\s*include\s*([<"])([^">]+)[">])");
  std::ifstream in(file);
  std::vector<Include> includes;
  for (std::string line; std::getline(in, line);) {
    std::smatch match;
    if (std::regex_search(line, match, kInclude)) includes.push_back({match[2], match[1] == "\""});
  }
  return includes;
}

TEST(LayersTest, FoldersIncludeOnlyWhatTheyMayKnow) {
  int files = 0;
  for (const auto& entry :
       fs::recursive_directory_iterator(std::string(OCTAVO_SOURCE_DIR) + "/src")) {
    const fs::path relative = fs::relative(entry.path(), std::string(OCTAVO_SOURCE_DIR) + "/src");
    const std::string extension = relative.extension().string();
    if (extension != ".cpp" && extension != ".h" && extension != ".cu" && extension != ".cuh")
      continue;
    ++files;
    const std::string folder = relative.begin()->string();
    ASSERT_TRUE(kMayKnow.count(folder)) << folder << " is not in the table";
    const bool test = relative.stem().string().ends_with("_test");
    for (const Include& include : IncludesOf(entry.path())) {
      const std::string other = include.target.substr(0, include.target.find('/'));
      // include/octavo/ is everybody's; it includes nothing of src/.
      const bool external =
          other == "octavo" || (test && other == "..") || (other == "hwy" && folder == "kernels");
      if (include.quoted && other != folder && !external) {
        EXPECT_TRUE(kMayKnow.at(folder).count(other)) << relative << " includes " << include.target;
      }
      const bool for_tests = relative.stem().string().starts_with("test");
      if (extension == ".h" && !for_tests && kStandardLibraryOnly.count(folder) &&
          !include.quoted) {
        const bool standard =
            include.target.find('/') == std::string::npos || include.target.starts_with("sys/");
        const bool highway =
            relative.string().ends_with("-inl.h") && include.target.starts_with("hwy/");
        EXPECT_TRUE(standard || highway) << relative << " includes <" << include.target << ">";
      }
    }
  }
  EXPECT_GT(files, 50);
}

TEST(LayersTest, OnlyHttpServerAndClientKnowSockets) {
  const fs::path src = std::string(OCTAVO_SOURCE_DIR) + "/src";
  int sockets = 0;
  for (const auto& entry : fs::recursive_directory_iterator(src)) {
    if (!entry.is_regular_file()) continue;
    for (const Include& include : IncludesOf(entry.path())) {
      if (!include.target.starts_with("boost/") && include.target != "sys/socket.h" &&
          include.target != "poll.h")
        continue;
      ++sockets;
      const std::string file = fs::relative(entry.path(), src).string();
      EXPECT_TRUE(file.starts_with("server/http_")) << file << " includes " << include.target;
    }
  }
  EXPECT_GT(sockets, 0);
}

}  // namespace
