// Numbers as Python writes, reads and rounds them.
#pragma once

#include <optional>
#include <string>
#include <string_view>

#include "text/jinja/value.h"

namespace octavo::jinja {

[[noreturn]] void ThrowIntegerTooLarge();

std::string IntText(Int value);
// In lower-case digits of a base from 2 to 36, without a sign for what is not negative.
std::string IntText(Int value, int base);
// repr(): the shortest that reads back the same.
std::string FloatText(double value);

// int(text, base) and float(text); nothing if the text is no such number. A number with white
// space around it and underscores between digits is one.
std::optional<Int> ParseInt(std::string_view text, int base = 10);
std::optional<double> ParseFloat(std::string_view text);

// int(value) of a finite number.
Int Truncate(double value);

// Exact, whatever the types: -1, 0, 1, or 2 if one is not a number.
int CompareNumbers(const Value& left, const Value& right);

Int AddInts(Int left, Int right);
Int SubtractInts(Int left, Int right);
Int MultiplyInts(Int left, Int right);
Int FloorDivideInts(Int left, Int right);
Int ModuloInts(Int left, Int right);
double FloorDivideFloats(double left, double right);
double ModuloFloats(double left, double right);
Value Power(const Value& left, const Value& right);

// round(value, digits), half to even as the decimal digits have it.
Value Round(const Value& value, int64_t digits);

}  // namespace octavo::jinja
