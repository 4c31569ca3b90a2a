// Python's operators on values, and its str() and repr().
//
// Functions that make values charge the heap for them. What compares or hashes is charged by the
// caller, with Value::weight().
#pragma once

#include <string>
#include <string_view>

#include "text/jinja/value.h"

namespace octavo::jinja {

enum class BinaryOp { kAdd, kSubtract, kMultiply, kDivide, kFloorDivide, kModulo, kPower };
enum class CompareOp { kEqual, kNotEqual, kLess, kLessEqual, kGreater, kGreaterEqual };

bool Truth(const Value& value);
bool Equal(const Value& left, const Value& right);
// The identity that `is` compares.
bool Same(const Value& left, const Value& right);
bool Compare(CompareOp op, const Value& left, const Value& right);

Value Binary(Heap& heap, BinaryOp op, const Value& left, const Value& right);
Value Negate(const Value& value);
Value Plus(const Value& value);

// len(); throws TypeError for what has none. Of loops: see Interpreter.
bool HasLength(const Value& value);
int64_t Length(const Value& value);

// Of a string, list, tuple or range. Missing bounds are Kind::kNone or kMissing.
Value Slice(Heap& heap, const Value& value, const Value& start, const Value& stop,
            const Value& step);
// value[index] with an index that may count from the end; missing if it is outside.
Value ItemAt(Heap& heap, const Value& value, Int index);

std::string Repr(const Value& value);
// str(). What it returns for a string keeps no markup.
std::string Str(const Value& value);
void AppendStr(const Value& value, std::string* out);

// markupsafe.escape: a string with markup stays as it is.
Value Escape(Heap& heap, const Value& value);
std::string EscapeText(std::string_view text);

// An integer argument: TypeError if it is none.
int64_t IndexOf(const Value& value);
// As IndexOf, but what does not fit is moved to the nearest that does.
int64_t ClampedIndexOf(const Value& value);

[[noreturn]] void ThrowUndefined(const Value& undefined);

}  // namespace octavo::jinja
