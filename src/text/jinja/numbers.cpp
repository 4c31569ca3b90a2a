#include "text/jinja/numbers.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

#include "text/jinja/python_text.h"

namespace octavo::jinja {
namespace {

using UnsignedInt = unsigned __int128;
constexpr Int kMaxInt = static_cast<Int>(~UnsignedInt{0} >> 1);
constexpr Int kMinInt = -kMaxInt - 1;

UnsignedInt Magnitude(Int value) {
  return value < 0 ? UnsignedInt{0} - static_cast<UnsignedInt>(value)
                   : static_cast<UnsignedInt>(value);
}

// Digits with single underscores between them, without those; nothing if they stand elsewhere.
std::optional<std::string> WithoutUnderscores(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '_') {
      out += text[i];
      continue;
    }
    const auto is_digit = [&](size_t at) {
      return at < text.size() && std::isalnum(static_cast<unsigned char>(text[at]));
    };
    if (i == 0 || !is_digit(i - 1) || !is_digit(i + 1)) return std::nullopt;
  }
  return out;
}

}  // namespace

void ThrowIntegerTooLarge() { ThrowLimit("an integer of more than 128 bits"); }

std::string IntText(Int value, int base) {
  std::string out;
  UnsignedInt rest = Magnitude(value);
  do {
    out += "0123456789abcdefghijklmnopqrstuvwxyz"[static_cast<int>(rest % base)];
    rest /= base;
  } while (rest != 0);
  if (value < 0) out += '-';
  std::reverse(out.begin(), out.end());
  return out;
}

std::string IntText(Int value) {
  if (value >= std::numeric_limits<int64_t>::min() &&
      value <= std::numeric_limits<int64_t>::max()) {
    return std::to_string(static_cast<int64_t>(value));
  }
  return IntText(value, 10);
}

std::string FloatText(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  char buffer[64];
  // Scientific first, for the exponent by which Python chooses.
  const auto [end, error] =
      std::to_chars(buffer, buffer + sizeof(buffer), value, std::chars_format::scientific);
  const std::string scientific(buffer, end);
  const size_t e = scientific.find('e');
  const int exponent = std::stoi(scientific.substr(e + 1));
  if (exponent < -4 || exponent >= 16) return scientific;
  const auto [fixed_end, fixed_error] =
      std::to_chars(buffer, buffer + sizeof(buffer), value, std::chars_format::fixed);
  std::string fixed(buffer, fixed_end);
  if (fixed.find('.') == fixed.npos) fixed += ".0";
  return fixed;
}

std::optional<Int> ParseInt(std::string_view text, int base) {
  text = StripSpace(text);
  const bool negative = text.starts_with('-');
  if (negative || text.starts_with('+')) text.remove_prefix(1);
  if (text.size() > 2 && text[0] == '0') {
    const char mark = static_cast<char>(text[1] | 0x20);
    const int marked = mark == 'x' ? 16 : mark == 'o' ? 8 : mark == 'b' ? 2 : 0;
    if (marked != 0 && (base == marked || base == 0)) {
      base = marked;
      text.remove_prefix(2);
      if (text.starts_with('_')) text.remove_prefix(1);
    }
  }
  if (base == 0) {
    if (text.size() > 1 && text[0] == '0' && text.find_first_not_of("0_") != text.npos) {
      return std::nullopt;
    }
    base = 10;
  }
  const std::optional<std::string> digits = WithoutUnderscores(text);
  if (!digits || digits->empty()) return std::nullopt;
  Int value = 0;
  for (char c : *digits) {
    const int digit = c >= '0' && c <= '9'                     ? c - '0'
                      : (c | 0x20) >= 'a' && (c | 0x20) <= 'z' ? (c | 0x20) - 'a' + 10
                                                               : 99;
    if (digit >= base) return std::nullopt;
    value = SubtractInts(MultiplyInts(value, base), digit);  // the negative range is the larger
  }
  if (negative) return value;
  return SubtractInts(0, value);
}

std::optional<double> ParseFloat(std::string_view text) {
  const std::optional<std::string> plain = WithoutUnderscores(StripSpace(text));
  if (!plain) return std::nullopt;
  std::string_view digits = *plain;
  const bool negative = digits.starts_with('-');
  if (negative || digits.starts_with('+')) digits.remove_prefix(1);
  if (digits.empty() || digits[0] == '-') return std::nullopt;
  double value = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (end != digits.data() + digits.size()) return std::nullopt;
  if (digits.find('(') != digits.npos) return std::nullopt;  // nan(...) is C's
  if (error == std::errc::result_out_of_range) {
    // Too large or too small: the exponent tells.
    const size_t e = digits.find_first_of("eE");
    const bool small = e != digits.npos ? digits.substr(e + 1).starts_with('-')
                                        : digits.starts_with("0.") || digits.starts_with('.');
    value = small ? 0 : std::numeric_limits<double>::infinity();
  } else if (error != std::errc()) {
    return std::nullopt;
  }
  return negative ? -value : value;
}

Int Truncate(double value) {
  if (std::isnan(value)) ThrowValueError("cannot convert float NaN to integer");
  if (std::isinf(value)) {
    throw Fault("OverflowError", "cannot convert float infinity to integer");
  }
  if (std::fabs(value) >= 0x1p127) ThrowIntegerTooLarge();
  return static_cast<Int>(value);
}

int CompareNumbers(const Value& left, const Value& right) {
  const auto order = [](auto a, auto b) { return a < b ? -1 : a > b ? 1 : 0; };
  if (left.IsIntegral() && right.IsIntegral()) return order(left.int_value(), right.int_value());
  if (right.IsIntegral()) {
    const int reversed = CompareNumbers(right, left);
    return reversed == 2 ? 2 : -reversed;
  }
  const double b = right.float_value();
  if (std::isnan(b)) return 2;
  if (!left.IsIntegral()) {
    const double a = left.float_value();
    return std::isnan(a) ? 2 : order(a, b);
  }
  if (b >= 0x1p127) return -1;
  if (b < -0x1p127) return 1;
  const double floor = std::floor(b);
  const int whole = order(left.int_value(), static_cast<Int>(floor));
  return whole == 0 && floor < b ? -1 : whole;
}

Int AddInts(Int left, Int right) {
  Int out;
  if (__builtin_add_overflow(left, right, &out)) ThrowIntegerTooLarge();
  return out;
}

Int SubtractInts(Int left, Int right) {
  Int out;
  if (__builtin_sub_overflow(left, right, &out)) ThrowIntegerTooLarge();
  return out;
}

// By division: clang's overflow builtin wants a function that libgcc lacks.
Int MultiplyInts(Int left, Int right) {
  if (left == 0 || right == 0) return 0;
  const UnsignedInt a = Magnitude(left), b = Magnitude(right);
  const bool negative = (left < 0) != (right < 0);
  const UnsignedInt most = Magnitude(negative ? kMinInt : kMaxInt);
  if (a > most / b) ThrowIntegerTooLarge();
  const UnsignedInt product = a * b;
  return static_cast<Int>(negative ? UnsignedInt{0} - product : product);
}

Int FloorDivideInts(Int left, Int right) {
  if (right == 0) throw Fault("ZeroDivisionError", "integer division or modulo by zero");
  if (right == -1) return SubtractInts(0, left);
  const Int quotient = left / right;
  return left % right != 0 && (left < 0) != (right < 0) ? quotient - 1 : quotient;
}

Int ModuloInts(Int left, Int right) {
  if (right == 0) throw Fault("ZeroDivisionError", "integer modulo by zero");
  if (right == -1) return 0;
  const Int rest = left % right;
  return rest != 0 && (rest < 0) != (right < 0) ? rest + right : rest;
}

double ModuloFloats(double left, double right) {
  if (right == 0) throw Fault("ZeroDivisionError", "float modulo");
  const double rest = std::fmod(left, right);
  if (rest == 0) return std::copysign(0.0, right);
  return (rest < 0) != (right < 0) ? rest + right : rest;
}

double FloorDivideFloats(double left, double right) {
  if (right == 0) throw Fault("ZeroDivisionError", "float floor division by zero");
  const double rest = std::fmod(left, right);
  double quotient = (left - rest) / right;
  if (rest != 0 && (rest < 0) != (right < 0)) quotient -= 1;
  if (quotient == 0) return std::copysign(0.0, left / right);
  const double floor = std::floor(quotient);
  return quotient - floor > 0.5 ? floor + 1 : floor;
}

Value Power(const Value& left, const Value& right) {
  if (left.IsIntegral() && right.IsIntegral() && right.int_value() >= 0) {
    Int base = left.int_value();
    Int exponent = right.int_value();
    if (base == 0 || base == 1) return Value::Integer(exponent == 0 ? 1 : base);
    if (base == -1) return Value::Integer(exponent % 2 == 0 ? 1 : -1);
    if (exponent > 127) ThrowIntegerTooLarge();
    Int product = 1;
    for (; exponent > 0; --exponent) product = MultiplyInts(product, base);
    return Value::Integer(product);
  }
  const double base = left.float_value(), exponent = right.float_value();
  if (base == 0 && exponent < 0) {
    throw Fault("ZeroDivisionError", "0.0 cannot be raised to a negative power");
  }
  if (base < 0 && std::isfinite(exponent) && std::floor(exponent) != exponent) {
    ThrowUnsupported("complex numbers");
  }
  const double power = std::pow(base, exponent);
  if (std::isinf(power) && std::isfinite(base) && std::isfinite(exponent)) {
    throw Fault("OverflowError", "(34, 'Numerical result out of range')");
  }
  return Value::Float(power);
}

Value Round(const Value& value, int64_t digits) {
  if (value.IsIntegral()) {
    if (digits >= 0) return Value::Integer(value.int_value());
    if (digits < -38) return Value::Integer(0);
    Int unit = 1;
    for (int64_t i = digits; i < 0; ++i) unit = MultiplyInts(unit, 10);
    const Int down = MultiplyInts(FloorDivideInts(value.int_value(), unit), unit);
    const Int rest = value.int_value() - down;
    const bool up = rest > unit / 2 || (rest == unit / 2 && (down / unit) % 2 != 0);
    return Value::Integer(up ? AddInts(down, unit) : down);
  }
  const double number = value.float_value();
  if (!std::isfinite(number) || digits > 330) return Value::Float(number);
  if (digits < -330) return Value::Float(std::copysign(0.0, number));
  if (digits >= 0) {
    const std::string text = fmt::format("{:.{}f}", number, digits);
    return Value::Float(*ParseFloat(text));
  }
  const double unit = std::pow(10.0, static_cast<double>(-digits));
  return Value::Float(std::nearbyint(number / unit) * unit);
}

}  // namespace octavo::jinja
