// Filters over many values.
#include <fmt/format.h>

#include <algorithm>
#include <unordered_set>

#include "text/jinja/attributes.h"
#include "text/jinja/builtins.h"
#include "text/jinja/interpreter.h"
#include "text/jinja/iterators.h"
#include "text/jinja/numbers.h"
#include "text/jinja/operators.h"
#include "text/jinja/python_text.h"

namespace octavo::jinja {
namespace {

// A path such as "function.name" or 0, which leads from an item to a part of it.
class Path {
 public:
  // Missing, none: the item itself.
  Path(Heap& heap, const Value& attribute, Value otherwise = Value())
      : otherwise_(std::move(otherwise)) {
    if (attribute.IsMissing() || attribute.IsNone()) return;
    if (!attribute.IsString()) {
      parts_.push_back(attribute);
      return;
    }
    for (std::string_view part : Split(attribute.text(), ".", -1)) {
      const bool is_index = IsAll(TextClass::kDigit, part);
      const auto index = is_index ? ParseInt(part) : std::nullopt;
      parts_.push_back(index ? Value::Integer(*index) : CopyString(heap, part));
    }
  }

  Value Of(Interpreter& interpreter, const Value& item) const {
    Value value = item;
    for (const Value& part : parts_) {
      value = GetItem(interpreter, value, part);
      if (value.IsUndefined() && !otherwise_.IsMissing() && !otherwise_.IsNone()) {
        value = otherwise_;
      }
    }
    return value;
  }

 private:
  Values parts_;
  Value otherwise_;
};

Value IgnoreCase(Heap& heap, const Value& value) {
  return value.IsString() ? MakeString(heap, Lower(value.text())) : value;
}

bool IsTrue(const Bound& bound, size_t index) { return bound.Has(index) && Truth(bound[index]); }

// As Python compares lists.
bool LessKeys(Heap& heap, const Values& left, const Values& right) {
  for (size_t i = 0; i < left.size(); ++i) {
    heap.Work(std::min(left[i].weight(), right[i].weight()));
    if (!Equal(left[i], right[i])) return Compare(CompareOp::kLess, left[i], right[i]);
  }
  return false;
}

bool LessKey(Heap& heap, const Value& left, const Value& right) {
  heap.Work(std::min(left.weight(), right.weight()));
  return Compare(CompareOp::kLess, left, right);
}

template <typename Key>
struct Keyed {
  Key key;
  Value value;
};

template <typename Key, typename Less>
void SortKeyed(Heap& heap, std::vector<Keyed<Key>>* items, bool reverse, Less less) {
  std::ranges::stable_sort(*items, [&](const Keyed<Key>& a, const Keyed<Key>& b) {
    heap.Work(1);
    return reverse ? less(heap, b.key, a.key) : less(heap, a.key, b.key);
  });
}

template <typename Key>
Value TakeValues(Heap& heap, std::vector<Keyed<Key>> items) {
  Values values;
  for (Keyed<Key>& item : items) values.push_back(std::move(item.value));
  return MakeList(heap, std::move(values));
}

Value SortFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_sort()", arguments, {"reverse", "case_sensitive", "attribute"});
  Heap& heap = interpreter.heap();
  std::vector<Path> paths;
  if (bound.Has(2) && bound[2].IsString()) {
    for (std::string_view part : Split(bound[2].text(), ",", -1)) {
      paths.emplace_back(heap, CopyString(heap, part));
    }
  } else {
    paths.emplace_back(heap, bound[2]);
  }
  const bool case_sensitive = IsTrue(bound, 1);
  std::vector<Keyed<Values>> items;
  for (Value& item : interpreter.Collect(value)) {
    Keyed<Values> keyed;
    for (const Path& path : paths) {
      Value key = path.Of(interpreter, item);
      keyed.key.push_back(case_sensitive ? std::move(key) : IgnoreCase(heap, key));
    }
    keyed.value = std::move(item);
    items.push_back(std::move(keyed));
  }
  SortKeyed(heap, &items, IsTrue(bound, 0), LessKeys);
  return TakeValues(heap, std::move(items));
}

Value DictSortFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_dictsort()", arguments, {"case_sensitive", "by", "reverse"});
  Heap& heap = interpreter.heap();
  const std::string by = bound.Has(1) ? Str(bound[1]) : "key";
  if (by != "key" && by != "value") {
    throw Fault("FilterArgumentError", "You can only sort by either \"key\" or \"value\"");
  }
  if (value.IsUndefined()) ThrowUndefined(value);
  if (!value.IsDict()) {
    throw Fault("AttributeError",
                fmt::format("'{}' object has no attribute 'items'", TypeName(value)));
  }
  std::vector<Keyed<Value>> items;
  for (const auto& [key, entry] : value.As<Dict>().entries()) {
    const Value& sort_by = by == "key" ? key : entry;
    items.push_back(
        {IsTrue(bound, 0) ? sort_by : IgnoreCase(heap, sort_by), MakeTuple(heap, {key, entry})});
  }
  SortKeyed(heap, &items, IsTrue(bound, 2), LessKey);
  return TakeValues(heap, std::move(items));
}

Value HintedUndefined(Heap& heap, const char* hint) {
  return Value(Kind::kUndefined, new Undefined(&heap, hint, nullptr, Value::None()));
}

template <CompareOp op>
Value Extreme(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_min()", arguments, {"case_sensitive", "attribute"});
  Heap& heap = interpreter.heap();
  const Path path(heap, bound[1]);
  Value best, best_key;
  for (const Value& item : interpreter.Collect(value)) {
    Value key = path.Of(interpreter, item);
    if (!IsTrue(bound, 0)) key = IgnoreCase(heap, key);
    if (!best.IsMissing()) {
      heap.Work(std::min(key.weight(), best_key.weight()));
      if (!Compare(op, key, best_key)) continue;
    }
    best = item;
    best_key = std::move(key);
  }
  return best.IsMissing() ? HintedUndefined(heap, "No aggregated item, sequence was empty.") : best;
}

struct HashKey {
  size_t operator()(const Value& value) const { return Hash(value); }
};
struct EqualKeys {
  bool operator()(const Value& a, const Value& b) const { return Equal(a, b); }
};

Value UniqueFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_unique()", arguments, {"case_sensitive", "attribute"});
  const Path path(interpreter.heap(), bound[1]);
  const bool case_sensitive = IsTrue(bound, 0);
  return MakeDeferredIterator(interpreter.heap(), interpreter.Iterate(value),
                              [path, case_sensitive](Interpreter& in, const Value& source) {
                                Values kept;
                                std::unordered_set<Value, HashKey, EqualKeys> seen;
                                for (Value& item : in.Collect(source)) {
                                  Value key = path.Of(in, item);
                                  if (!case_sensitive) key = IgnoreCase(in.heap(), key);
                                  in.heap().Work(key.weight());
                                  if (seen.insert(std::move(key)).second)
                                    kept.push_back(std::move(item));
                                }
                                return kept;
                              });
}

Value GroupByFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_groupby()", arguments, {"attribute", "default", "case_sensitive"}, 1);
  Heap& heap = interpreter.heap();
  const Path path(heap, bound[0], bound[1]);
  const bool case_sensitive = IsTrue(bound, 2);
  std::vector<Keyed<Value>> items;
  for (Value& item : interpreter.Collect(value)) {
    Value key = path.Of(interpreter, item);
    items.push_back({case_sensitive ? std::move(key) : IgnoreCase(heap, key), std::move(item)});
  }
  SortKeyed(heap, &items, false, LessKey);
  Values groups;
  for (size_t begin = 0; begin < items.size();) {
    Values members;
    size_t end = begin;
    while (end < items.size() && Equal(items[begin].key, items[end].key)) {
      members.push_back(items[end++].value);
    }
    const Value key = case_sensitive ? items[begin].key : path.Of(interpreter, members[0]);
    Values group = {key, MakeList(heap, std::move(members))};
    groups.push_back(Value(Kind::kTuple, new Sequence(&heap, std::move(group), true)));
    begin = end;
  }
  return MakeList(heap, std::move(groups));
}

Value SumFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_sum()", arguments, {"attribute", "start"});
  Heap& heap = interpreter.heap();
  const Path path(heap, bound[0]);
  Value sum = bound.Has(1) ? bound[1] : Value::Integer(0);
  if (sum.IsString()) ThrowTypeError("sum() can't sum strings [use ''.join(seq) instead]");
  for (const Value& item : interpreter.Collect(value)) {
    sum = Binary(heap, BinaryOp::kAdd, sum, path.Of(interpreter, item));
  }
  return sum;
}

Value JoinFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_join()", arguments, {"d", "attribute"});
  Heap& heap = interpreter.heap();
  const Path path(heap, bound[1]);
  const std::string separator = bound.Has(0) ? Str(bound[0]) : "";
  std::string out;
  bool first = true;
  for (const Value& item : interpreter.Collect(value)) {
    const Value part = path.Of(interpreter, item);
    heap.Reserve(out.size() + separator.size() + (part.IsString() ? part.text().size() : 0));
    if (!first) out += separator;
    AppendStr(part, &out);
    first = false;
  }
  return MakeString(heap, std::move(out));
}

Value FirstFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_first()", arguments, {});
  const Value iterator = interpreter.Iterate(value);
  Value item;
  if (iterator.As<Iterator>().Next(interpreter, &item)) return item;
  return HintedUndefined(interpreter.heap(), "No first item, sequence was empty.");
}

Value LastFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_last()", arguments, {});
  if (!HasLength(value)) {
    ThrowTypeError(fmt::format("'{}' object is not reversible", TypeName(value)));
  }
  if (Length(value) == 0) {
    return HintedUndefined(interpreter.heap(), "No last item, sequence was empty.");
  }
  if (value.IsDict() || value.Is(Kind::kView)) {
    Value item;
    const Value iterator = MakeReverseIterator(interpreter.heap(), value);
    iterator.As<Iterator>().Next(interpreter, &item);
    return item;
  }
  Value item = ItemAt(interpreter.heap(), value, -1);
  return item.IsString() && value.IsString() ? interpreter.ToString(item) : item;
}

Value ReverseFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_reverse()", arguments, {});
  Heap& heap = interpreter.heap();
  if (value.IsString()) {
    return Slice(heap, value, Value::None(), Value::None(), Value::Integer(-1));
  }
  if (HasLength(value)) return MakeReverseIterator(heap, value);
  if (!interpreter.IsIterable(value)) {
    throw Fault("FilterArgumentError", "argument must be iterable");
  }
  Values items = interpreter.Collect(value);
  std::ranges::reverse(items);
  return MakeList(heap, std::move(items));
}

Value ListFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_list()", arguments, {});
  return MakeList(interpreter.heap(), interpreter.Collect(value));
}

Value EmptyIterator(Interpreter& interpreter) {
  return interpreter.Iterate(MakeList(interpreter.heap(), {}));
}

Value ItemsFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_items()", arguments, {});
  // As Python's generator, it finds out when it is asked for the first.
  return MakeDeferredIterator(interpreter.heap(), value, [](Interpreter& in, const Value& source) {
    if (source.IsUndefined()) return Values();
    if (!source.IsDict()) ThrowTypeError("Can only get item pairs from a mapping.");
    const Value view(Kind::kView, new View(&in.heap(), source, View::Part::kItems));
    return in.Collect(view);
  });
}

Value BatchFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_batch()", arguments, {"linecount", "fill_with"}, 1);
  const int64_t size = IndexOf(bound[0]);
  const Value fill = bound[1];
  return MakeDeferredIterator(interpreter.heap(), interpreter.Iterate(value),
                              [size, fill](Interpreter& in, const Value& source) {
                                Heap& heap = in.heap();
                                Values batches, batch;
                                const auto flush = [&] {
                                  batches.push_back(MakeList(heap, std::exchange(batch, {})));
                                };
                                bool any = false;
                                for (Value& item : in.Collect(source)) {
                                  if (any && static_cast<int64_t>(batch.size()) == size) flush();
                                  batch.push_back(std::move(item));
                                  any = true;
                                }
                                if (batch.empty()) return batches;
                                const auto count = static_cast<int64_t>(batch.size());
                                if (!fill.IsMissing() && !fill.IsNone() && count < size) {
                                  if (size > int64_t{1} << 40) heap.Reserve(~size_t{0});
                                  heap.Reserve(size * sizeof(Value));
                                  heap.Work(size);
                                  batch.resize(size, fill);
                                }
                                flush();
                                return batches;
                              });
}

Value SliceFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  const Bound bound("do_slice()", arguments, {"slices", "fill_with"}, 1);
  const int64_t slices = IndexOf(bound[0]);
  const Value fill = bound[1];
  return MakeDeferredIterator(interpreter.heap(), interpreter.Iterate(value),
                              [slices, fill](Interpreter& in, const Value& source) {
                                Heap& heap = in.heap();
                                const Values items = in.Collect(source);
                                if (slices == 0) {
                                  throw Fault("ZeroDivisionError",
                                              "integer division or modulo by zero");
                                }
                                Values out;
                                if (slices < 0) return out;
                                if (slices > int64_t{1} << 40) heap.Reserve(~size_t{0});
                                heap.Reserve(slices * (sizeof(Value) + sizeof(Sequence)));
                                const auto length = static_cast<int64_t>(items.size());
                                const int64_t least = length / slices, with_extra = length % slices;
                                int64_t at = 0;
                                for (int64_t i = 0; i < slices; ++i) {
                                  const int64_t count = least + (i < with_extra);
                                  Values slice(items.begin() + at, items.begin() + at + count);
                                  if (!fill.IsMissing() && !fill.IsNone() && i >= with_extra)
                                    slice.push_back(fill);
                                  out.push_back(MakeList(heap, std::move(slice)));
                                  at += count;
                                }
                                return out;
                              });
}

// The first argument is a name.
std::string TakeName(Arguments* arguments) {
  if (arguments->positional.empty()) return "";
  std::string name = Str(arguments->positional[0]);
  arguments->positional.erase(arguments->positional.begin());
  return name;
}

Value MapFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  if (!interpreter.TruthOf(value)) return EmptyIterator(interpreter);
  Heap& heap = interpreter.heap();
  const Value iterator = interpreter.Iterate(value);
  if (arguments.positional.empty()) {
    if (std::ranges::find(arguments.named, "attribute", &std::pair<std::string, Value>::first) ==
        arguments.named.end()) {
      throw Fault("FilterArgumentError", "map requires a filter argument");
    }
    const Bound bound("map", arguments, {"attribute", "default"});
    const Path path(heap, bound[0], bound[1]);
    return MakeStepIterator(heap, iterator, [path](Interpreter& in, Value* item) {
      *item = path.Of(in, *item);
      return true;
    });
  }
  const std::string name = TakeName(&arguments);
  return MakeStepIterator(heap, iterator, [name, arguments](Interpreter& in, Value* item) {
    *item = in.CallFilter(name, *item, arguments);
    return true;
  });
}

Value SelectOrReject(Interpreter& interpreter, const Value& value, Arguments& arguments,
                     bool by_attribute, bool wanted) {
  if (!interpreter.TruthOf(value)) return EmptyIterator(interpreter);
  Heap& heap = interpreter.heap();
  Value attribute;
  if (by_attribute) {
    if (arguments.positional.empty()) {
      throw Fault("FilterArgumentError", "Missing parameter for attribute name");
    }
    attribute = arguments.positional[0];
    arguments.positional.erase(arguments.positional.begin());
  }
  const Path path(heap, attribute);
  const bool by_truth = arguments.positional.empty();
  const std::string test = TakeName(&arguments);
  return MakeStepIterator(heap, interpreter.Iterate(value),
                          [path, by_truth, test, arguments, wanted](Interpreter& in, Value* item) {
                            const Value subject = path.Of(in, *item);
                            const bool holds = by_truth ? in.TruthOf(subject)
                                                        : in.CallTest(test, subject, arguments);
                            return holds == wanted;
                          });
}

template <bool by_attribute, bool wanted>
Value SelectFilter(Interpreter& interpreter, const Value& value, Arguments& arguments) {
  return SelectOrReject(interpreter, value, arguments, by_attribute, wanted);
}

constexpr Builtin kFilters[] = {{"batch", BatchFilter},
                                {"dictsort", DictSortFilter},
                                {"first", FirstFilter},
                                {"groupby", GroupByFilter},
                                {"items", ItemsFilter},
                                {"join", JoinFilter},
                                {"last", LastFilter},
                                {"list", ListFilter},
                                {"map", MapFilter},
                                {"max", Extreme<CompareOp::kGreater>},
                                {"min", Extreme<CompareOp::kLess>},
                                {"reject", SelectFilter<false, false>},
                                {"rejectattr", SelectFilter<true, false>},
                                {"reverse", ReverseFilter},
                                {"select", SelectFilter<false, true>},
                                {"selectattr", SelectFilter<true, true>},
                                {"slice", SliceFilter},
                                {"sort", SortFilter},
                                {"sum", SumFilter},
                                {"unique", UniqueFilter}};

}  // namespace

Native FindSequenceFilter(std::string_view name) {
  const auto found = std::ranges::find(kFilters, name, &Builtin::name);
  return found == std::end(kFilters) ? nullptr : found->function;
}

}  // namespace octavo::jinja
