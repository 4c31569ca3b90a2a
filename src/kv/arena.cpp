#include "kv/arena.h"

#include <algorithm>
#include <map>

#include <fmt/format.h>

#include "base/error.h"

namespace octavo {
namespace {

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The slab length with the least expected loss: what stays behind the last page in the group that
// fits worst, plus one partly used slab per group. Candidates are multiples of the groups' page
// sizes, since between two of them the waste only grows; 64 multiples reach well below 2 % waste,
// and longer slabs lose more by being partly used.
int64_t ChooseSlabBytes(const std::vector<KvGroup>& groups, int64_t arena_bytes) {
  int64_t largest = 0;
  for (const KvGroup& group : groups) largest = std::max(largest, group.page_bytes);
  const int64_t count = static_cast<int64_t>(groups.size());
  int64_t best = largest;
  double best_loss = std::numeric_limits<double>::infinity();
  for (const KvGroup& candidate : groups) {
    for (int64_t slab = CeilDiv(largest, candidate.page_bytes) * candidate.page_bytes;
         slab <= 64 * largest; slab += candidate.page_bytes) {
      if (slab * count > arena_bytes && slab > largest) break;
      double waste = 0;
      for (const KvGroup& group : groups) {
        waste = std::max(waste, static_cast<double>(slab % group.page_bytes) / slab);
      }
      const double loss = waste + static_cast<double>(count * slab) / arena_bytes;
      if (loss < best_loss || (loss == best_loss && slab < best)) {
        best_loss = loss;
        best = slab;
      }
    }
  }
  return best;
}

}  // namespace

GroupGeometry MakeGroups(std::span<const KvLayerFacts> layers, std::span<const LayerFormat> formats,
                         int64_t arena_bytes) {
  OCTAVO_CHECK(!layers.empty() && layers.size() == formats.size(), layers.size(), formats.size());
  std::map<int, int> group_of_window;  // ascending: full attention (0) first
  for (const KvLayerFacts& layer : layers) group_of_window[layer.window] = 0;

  GroupGeometry geometry;
  for (auto& [window, group] : group_of_window) {
    OCTAVO_CHECK(window >= 0, window);
    group = static_cast<int>(geometry.groups.size());
    geometry.groups.push_back({.window = window, .layers = {}, .page_bytes = 0});
  }
  for (size_t i = 0; i < layers.size(); ++i) {
    OCTAVO_CHECK(layers[i].kv_heads > 0 && layers[i].head_dim > 0, i);
    const LayerPlace place = {.group = group_of_window[layers[i].window],
                              .claim_offset = 0,
                              .layout = {.k_format = formats[i].k,
                                         .v_format = formats[i].v,
                                         .kv_heads = layers[i].kv_heads,
                                         .head_dim = layers[i].head_dim}};
    KvGroup& group = geometry.groups[place.group];
    geometry.layers.push_back(place);
    geometry.layers.back().claim_offset = group.page_bytes;
    group.layers.push_back(static_cast<int>(i));
    group.page_bytes += place.layout.ClaimBytes();
  }
  geometry.slab_bytes = ChooseSlabBytes(geometry.groups, std::max<int64_t>(arena_bytes, 1));
  const int64_t least = geometry.slab_bytes * static_cast<int64_t>(geometry.groups.size());
  if (arena_bytes < least) {
    throw Error(ErrorCode::kResourceExhausted,
                fmt::format("--kv-cache-memory-bytes: the KV cache has {} bytes, but {} kinds of "
                            "layers need a slab of {} bytes "
                            "each: at least {} bytes",
                            arena_bytes, geometry.groups.size(), geometry.slab_bytes, least));
  }
  return geometry;
}

int64_t WindowPages(int64_t window, int64_t chunk) {
  // window - 1 tokens behind the chunk's first, and the chunk; a run of n tokens touches at most (n
  // + 62) / 64 + 1 pages.
  return (window - 1 + chunk + kPageSize - 2) / kPageSize + 1;
}

int64_t TokensThatFit(const GroupGeometry& geometry, int64_t slabs, int64_t sequences,
                      int64_t chunk) {
  const auto fits = [&](int64_t tokens) {
    // At worst all sequences but one end on a page with a single token.
    const int64_t others = std::min(sequences - 1, tokens);
    const int64_t pages = others + CeilDiv(tokens - others, kPageSize);
    int64_t needed = 0;
    for (size_t g = 0; g < geometry.groups.size(); ++g) {
      const int window = geometry.groups[g].window;
      const int64_t held =
          window == 0 ? pages : std::min(pages, sequences * WindowPages(window, chunk));
      needed += CeilDiv(held, geometry.PagesPerSlab(static_cast<int>(g)));
    }
    return needed <= slabs;
  };
  int64_t low = 0, high = int64_t{1} << 50;  // more tokens than an arena has bytes
  if (fits(high)) return kUnbounded;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (fits(middle) ? low : high) = middle;
  }
  return low;
}

std::vector<std::string> Describe(const GroupGeometry& geometry, int64_t arena_bytes) {
  std::vector<std::string> lines;
  for (size_t g = 0; g < geometry.groups.size(); ++g) {
    const KvGroup& group = geometry.groups[g];
    const int64_t waste = geometry.SlabWaste(static_cast<int>(g));
    lines.push_back(fmt::format(
        "{}, {}: {} bytes per token, pages of {} bytes, {} pages per slab, {} bytes ({:.2f} %) of "
        "a slab "
        "unused",
        LayersText(group.layers),
        group.window == 0 ? "full attention" : fmt::format("window {}", group.window),
        group.BytesPerToken(), group.page_bytes, geometry.PagesPerSlab(static_cast<int>(g)), waste,
        100.0 * waste / geometry.slab_bytes));
  }
  lines.push_back(fmt::format("{} slabs of {} bytes in {} bytes", arena_bytes / geometry.slab_bytes,
                              geometry.slab_bytes, arena_bytes));
  return lines;
}

Arena::Arena(std::byte* base, int64_t bytes, GroupGeometry geometry)
    : base_(base), geometry_(std::move(geometry)) {
  OCTAVO_CHECK(reinterpret_cast<uintptr_t>(base) % 64 == 0, base);
  OCTAVO_CHECK(geometry_.slab_bytes > 0 && geometry_.slab_bytes % kPageUnit == 0,
               geometry_.slab_bytes);
  const int64_t count = bytes / geometry_.slab_bytes;
  OCTAVO_CHECK(count * geometry_.slab_bytes / kPageUnit < int64_t{kNoPage}, bytes);
  const int groups = static_cast<int>(geometry_.groups.size());
  for (int g = 0; g < groups; ++g) {
    max_pages_per_slab_ = std::max(max_pages_per_slab_, geometry_.PagesPerSlab(g));
  }
  slabs_.resize(count);
  for (int64_t slab = count; slab-- > 0;) free_slabs_.push_back(slab);
  partial_.resize(groups);
  lent_slabs_.resize(groups);
  allocated_.resize(groups);
  taken_.resize(index_limit());
}

Arena::Location Arena::Locate(uint32_t page) const {
  const int64_t offset = int64_t{page} * kPageUnit;
  const int64_t slab = offset / geometry_.slab_bytes;
  OCTAVO_CHECK(page != kNoPage && slab < slabs() && slabs_[slab].group >= 0, page);
  const int64_t page_bytes = geometry_.groups[slabs_[slab].group].page_bytes;
  const int64_t within = offset % geometry_.slab_bytes;
  OCTAVO_CHECK(within % page_bytes == 0, page, page_bytes);
  const int64_t number = within / page_bytes;
  OCTAVO_CHECK(taken_[slab * max_pages_per_slab_ + number], page);
  return {.slab = slab, .number = static_cast<int32_t>(number)};
}

int64_t Arena::SlabOf(uint32_t page) const { return Locate(page).slab; }
int Arena::GroupOf(uint32_t page) const { return slabs_[Locate(page).slab].group; }

int64_t Arena::IndexOf(uint32_t page) const {
  const Location at = Locate(page);
  return at.slab * max_pages_per_slab_ + at.number;
}

uint32_t Arena::Allocate(int group) {
  auto& partial = partial_[group];
  if (partial.empty()) {
    if (free_slabs_.empty()) return kNoPage;
    const int64_t slab = free_slabs_.back();
    free_slabs_.pop_back();
    const int64_t pages = geometry_.PagesPerSlab(group);
    slabs_[slab].group = group;
    for (int64_t number = pages; number-- > 0;) {
      slabs_[slab].free.push_back(static_cast<int32_t>(number));
    }
    partial.emplace(pages, slab);
    ++lent_slabs_[group];
  }
  const auto [free_pages, slab] = *partial.begin();
  partial.erase(partial.begin());
  if (free_pages > 1) partial.emplace(free_pages - 1, slab);
  const int32_t number = slabs_[slab].free.back();
  slabs_[slab].free.pop_back();
  taken_[slab * max_pages_per_slab_ + number] = true;
  ++allocated_[group];
  const int64_t offset = slab * geometry_.slab_bytes + number * geometry_.groups[group].page_bytes;
  return static_cast<uint32_t>(offset / kPageUnit);
}

void Arena::Free(uint32_t page) {
  const Location at = Locate(page);
  Slab& slab = slabs_[at.slab];
  const int group = slab.group;
  auto& partial = partial_[group];
  const int64_t free_before = static_cast<int64_t>(slab.free.size());
  if (free_before > 0) partial.erase({free_before, at.slab});
  taken_[at.slab * max_pages_per_slab_ + at.number] = false;
  --allocated_[group];
  slab.free.push_back(at.number);
  if (free_before + 1 < geometry_.PagesPerSlab(group)) {
    partial.emplace(free_before + 1, at.slab);
    return;
  }
  slab = Slab{};
  free_slabs_.push_back(at.slab);
  --lent_slabs_[group];
}

}  // namespace octavo
