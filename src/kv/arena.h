// Groups, slabs and pages: how one stretch of memory is cut for layers that need different amounts
// of it.
//
// A group is a set of layers that share block tables: all full-attention layers, or all layers of
// one window size. A page of a group holds kPageSize tokens of all its layers; each layer claims
// KvLayout::ClaimBytes of it at a fixed offset. So mixed formats cost no padding: a page is exactly
// as large as its claims.
//
// Groups have different page sizes and share one arena: it is cut into slabs of one fixed size, a
// slab is lent to a group and cut into that group's pages, and goes back when all of them are free.
// No split of memory between groups is fixed in advance. What a slab's length leaves behind its
// last page is wasted; MakeGroups chooses the length so that this stays small.
//
// A page id is the page's offset from the arena's base in units of kPageUnit, so a kernel needs
// only base + id * kPageUnit + claim_offset. The arena never touches the memory it cuts: host or
// device, it is all the same.
//
// Not thread-safe: one thread (the engine's loop) owns it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "kv/policy.h"
#include "octavo/kv_layout.h"

namespace octavo {

struct KvGroup {
  int window = 0;  // 0: full attention
  std::vector<int> layers;
  int64_t page_bytes = 0;  // the sum of the layers' claims
  int64_t BytesPerToken() const { return page_bytes / kPageSize; }
};

// Where a model layer's keys and values lie.
struct LayerPlace {
  int group = 0;
  int64_t claim_offset = 0;  // within a page of the group
  KvLayout layout;
};

struct GroupGeometry {
  std::vector<KvGroup> groups;  // full attention first, then windows in ascending order
  std::vector<LayerPlace> layers;
  int64_t slab_bytes = 0;

  int64_t PagesPerSlab(int group) const { return slab_bytes / groups[group].page_bytes; }
  int64_t SlabWaste(int group) const { return slab_bytes % groups[group].page_bytes; }
};

// arena_bytes: what will be cut; it bounds the length of a slab. Error: it holds less than one slab
// per group.
GroupGeometry MakeGroups(std::span<const KvLayerFacts> layers, std::span<const LayerFormat> formats,
                         int64_t arena_bytes);

// Tokens of all sequences together that fit into `slabs` fresh slabs however they are distributed
// over at most `sequences`, if none has more than `chunk` tokens in one step. kUnbounded: there is
// no full-attention group, and the windows fit.
inline constexpr int64_t kUnbounded = std::numeric_limits<int64_t>::max();
int64_t TokensThatFit(const GroupGeometry& geometry, int64_t slabs, int64_t sequences,
                      int64_t chunk);

// Pages of a window group that one sequence holds at most.
int64_t WindowPages(int64_t window, int64_t chunk);

// For people: one line per group, one about slabs.
std::vector<std::string> Describe(const GroupGeometry& geometry, int64_t arena_bytes);

class Arena {
 public:
  // `base` is a multiple of 64 (what vector and bulk copies want) or null (ids only).
  Arena(std::byte* base, int64_t bytes, GroupGeometry geometry);

  std::byte* base() const { return base_; }
  const GroupGeometry& geometry() const { return geometry_; }

  uint32_t Allocate(int group);  // kNoPage: the group has no free page and no slab is free
  void Free(uint32_t page);

  int64_t slabs() const { return static_cast<int64_t>(slabs_.size()); }
  int64_t free_slabs() const { return static_cast<int64_t>(free_slabs_.size()); }
  int64_t lent_slabs(int group) const { return lent_slabs_[group]; }
  int64_t allocated(int group) const { return allocated_[group]; }  // pages

  // Of an allocated page. IndexOf is dense: below index_limit(), and no two pages that exist
  // together share one.
  int64_t SlabOf(uint32_t page) const;
  int GroupOf(uint32_t page) const;
  int64_t IndexOf(uint32_t page) const;
  int64_t index_limit() const { return slabs() * max_pages_per_slab_; }

 private:
  struct Slab {
    int group = -1;             // -1: not lent
    std::vector<int32_t> free;  // page numbers within the slab
  };
  struct Location {
    int64_t slab;
    int32_t number;  // of the page within the slab
  };
  Location Locate(uint32_t page) const;

  std::byte* base_ = nullptr;
  GroupGeometry geometry_;
  int64_t max_pages_per_slab_ = 0;
  std::vector<Slab> slabs_;
  std::vector<int64_t> free_slabs_;  // a stack, lowest address on top at the start
  // Per group, lent slabs with free pages as (free pages, slab): the fullest is used first, so that
  // others drain.
  std::vector<std::set<std::pair<int64_t, int64_t>>> partial_;
  std::vector<int64_t> lent_slabs_, allocated_;
  std::vector<bool> taken_;  // by index
};

}  // namespace octavo
