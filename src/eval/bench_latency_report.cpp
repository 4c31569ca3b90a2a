// How the latency benchmark is shown: a table, JSON, a page with both plots.
#include <algorithm>
#include <cmath>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "eval/bench_latency.h"
#include "eval/html.h"

namespace octavo {
namespace {

using Points = std::vector<std::vector<Measurement>>;

double Median(const std::vector<Measurement>& group) {
  std::vector<double> values;
  for (const Measurement& m : group) values.push_back(m.y);
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

std::string Tokens(double tokens) {
  if (std::isinf(tokens)) return "never";
  return tokens < 0.5 ? "always" : fmt::format("{:.0f}", tokens);
}

std::string WithInterval(const Estimate& e, double factor, int digits) {
  return fmt::format("{:.{}f} [{:.{}f}, {:.{}f}]", e.value * factor, digits,
                     e.interval.low * factor, digits, e.interval.high * factor, digits);
}

// ---- plots

constexpr double kWidth = 530, kHeight = 300, kLeft = 64, kBottom = 40, kTop = 12, kRight = 16;
constexpr const char* kColours[] = {"#5b7083", "#d9622b", "#2a7fb8",
                                    "#4c9a52", "#8b5fb0", "#b8a02a"};

double NiceStep(double range) {
  const double power = std::pow(10, std::floor(std::log10(range / 5)));
  for (const double step : {1.0, 2.0, 5.0}) {
    if (range / (step * power) <= 6) return step * power;
  }
  return 10 * power;
}

// Measurements as dots, the fit as a line; x in tokens, y in milliseconds.
std::string Plot(const LatencyReport& report, Points LatencyVariant::*points, int degree,
                 const std::string& label) {
  double x_most = 0, y_most = 0;
  for (const LatencyVariant& v : report.variants) {
    for (const auto& group : v.*points) {
      for (const Measurement& m : group) {
        x_most = std::max(x_most, m.x);
        y_most = std::max(y_most, 1e3 * m.y);
      }
    }
  }
  y_most *= 1.05;
  const auto x_at = [&](double x) { return kLeft + x / x_most * (kWidth - kLeft - kRight); };
  const auto y_at = [&](double y) {
    return kHeight - kBottom - y / y_most * (kHeight - kBottom - kTop);
  };
  std::string out = fmt::format(
      "<figure><figcaption>{}</figcaption><svg viewBox=\"0 0 {} {}\" width=\"{}\" role=\"img\">",
      label, kWidth, kHeight, kWidth);
  const double y_step = NiceStep(y_most), x_step = NiceStep(x_most / 1024) * 1024;
  for (double y = 0; y <= y_most; y += y_step) {
    out += fmt::format(
        "<line x1=\"{}\" x2=\"{}\" y1=\"{:.1f}\" y2=\"{:.1f}\" class=\"grid\"/>"
        "<text x=\"{}\" y=\"{:.1f}\" text-anchor=\"end\">{:g}</text>",
        kLeft, kWidth - kRight, y_at(y), y_at(y), kLeft - 8, y_at(y) + 4, y);
  }
  for (double x = 0; x <= x_most * 1.001; x += x_step) {
    out += fmt::format("<text x=\"{:.1f}\" y=\"{}\" text-anchor=\"middle\">{:g}k</text>", x_at(x),
                       kHeight - kBottom + 20, x / 1024);
  }
  for (size_t i = 0; i < report.variants.size(); ++i) {
    const LatencyVariant& v = report.variants[i];
    const char* colour = kColours[i % std::size(kColours)];
    std::vector<Measurement> all;
    for (const auto& group : v.*points) all.insert(all.end(), group.begin(), group.end());
    const auto c = FitPolynomial(all, degree, degree == 2);
    out +=
        fmt::format("<polyline fill=\"none\" stroke=\"{}\" stroke-width=\"1.5\" points=\"", colour);
    for (int step = 0; step <= 60; ++step) {
      const double x = x_most * step / 60;
      out += fmt::format("{:.1f},{:.1f} ", x_at(x),
                         y_at(std::max(0.0, 1e3 * (c[0] + c[1] * x + c[2] * x * x))));
    }
    out += "\"/>";
    for (const Measurement& m : all) {
      out += fmt::format(
          "<circle cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3\" fill=\"{}\"><title>{}: {:.0f} tokens, "
          "{:.3f} "
          "ms</title></circle>",
          x_at(m.x), y_at(1e3 * m.y), colour, EscapeHtml(v.name), m.x, 1e3 * m.y);
    }
    out += fmt::format("<text x=\"{}\" y=\"{}\" fill=\"{}\" class=\"key\">{}</text>", kLeft + 12,
                       kTop + 14 + 18 * static_cast<double>(i), colour, EscapeHtml(v.name));
  }
  return out + "</svg></figure>\n";
}

nlohmann::ordered_json Json(const Estimate& e) {
  const auto number = [](double x) {
    return std::isfinite(x) ? nlohmann::ordered_json(x) : nlohmann::ordered_json("never");
  };
  return {{"value", number(e.value)},
          {"low", number(e.interval.low)},
          {"high", number(e.interval.high)}};
}

}  // namespace

std::string LatencyTable(const LatencyReport& report) {
  std::string out = fmt::format(
      "{}: reads {:.0f} GB/s; a token reads {:.2f} GB of weights: at least {:.3f} ms\n\n{:<24} "
      "{:>8} "
      "{:>12} {:>12}\n",
      report.device, report.read_bandwidth * 1e-9, report.weight_bytes_per_token * 1e-9,
      1e3 * report.weight_bytes_per_token / report.read_bandwidth, "variant", "input", "TTFT ms",
      "ITL ms");
  for (size_t l = 0; l < report.variants[0].itl.size(); ++l) {
    for (const LatencyVariant& v : report.variants) {
      out += fmt::format("{:<24} {:>8.0f} {:>12.2f} {:>12.3f}\n", v.name, v.ttft[l][0].x,
                         1e3 * Median(v.ttft[l]), 1e3 * Median(v.itl[l]));
    }
  }
  out += fmt::format(
      "\n95 % intervals in brackets; ratios and break-even against {}\n{:<24} {:>26} {:>24} {:>20} "
      "{:>20} {:>24}\n",
      report.variants[0].name, "variant", "ITL slope ns/token", "intercept ms", "slope ratio",
      "limit ns/token", "TTFT a ratio");
  for (const LatencyVariant& v : report.variants) {
    out += fmt::format(
        "{:<24} {:>26} {:>24} {:>20} {:>20.2f} {:>24}\n", v.name, WithInterval(v.slope, 1e9, 2),
        WithInterval(v.intercept, 1e3, 3), WithInterval(v.slope_ratio, 1, 3),
        1e9 * v.cache_bytes_per_token / report.read_bandwidth, WithInterval(v.ttft_a_ratio, 1, 3));
  }
  for (size_t i = 1; i < report.variants.size(); ++i) {
    const LatencyVariant& v = report.variants[i];
    out += fmt::format("{}: intercept {} ms against {}; faster from {} tokens on [{}, {}]\n",
                       v.name, WithInterval(v.intercept_difference, 1e3, 3),
                       report.variants[0].name, Tokens(v.break_even.value),
                       Tokens(v.break_even.interval.low), Tokens(v.break_even.interval.high));
  }
  return out + fmt::format("{}: intercept / limit {:.3f}\n", report.variants[0].name,
                           report.variants[0].intercept.value * report.read_bandwidth /
                               report.weight_bytes_per_token);
}

std::string LatencyJson(const LatencyReport& report) {
  nlohmann::ordered_json json = {{"model", report.model},
                                 {"device", report.device},
                                 {"output_len", report.output_len},
                                 {"repeats", report.repeats},
                                 {"read_bandwidth", report.read_bandwidth},
                                 {"weight_bytes_per_token", report.weight_bytes_per_token},
                                 {"variants", nlohmann::ordered_json::array()}};
  for (const LatencyVariant& v : report.variants) {
    nlohmann::ordered_json points = nlohmann::ordered_json::array();
    for (size_t l = 0; l < v.ttft.size(); ++l) {
      for (size_t r = 0; r < v.ttft[l].size(); ++r) {
        points.push_back(
            {{"input_len", v.ttft[l][r].x}, {"ttft_s", v.ttft[l][r].y}, {"itl_s", v.itl[l][r].y}});
      }
    }
    json["variants"].push_back({{"name", v.name},
                                {"cache_bytes_per_token", v.cache_bytes_per_token},
                                {"itl_slope_s", Json(v.slope)},
                                {"itl_intercept_s", Json(v.intercept)},
                                {"slope_ratio", Json(v.slope_ratio)},
                                {"intercept_difference_s", Json(v.intercept_difference)},
                                {"break_even_tokens", Json(v.break_even)},
                                {"ttft_a", Json(v.ttft_a)},
                                {"ttft_b", Json(v.ttft_b)},
                                {"ttft_c", Json(v.ttft_c)},
                                {"ttft_a_ratio", Json(v.ttft_a_ratio)},
                                {"points", points}});
  }
  return json.dump(1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

std::string LatencyHtml(const LatencyReport& report) {
  std::string body = fmt::format(
      "<style>svg {{ max-width: 100%; height: auto; }} svg text {{ font: 12px system-ui, "
      "sans-serif; "
      "fill: #555; }} svg text.key {{ font-weight: 600; fill: revert-layer; }} svg .grid {{ "
      "stroke: "
      "#e4e4e4; }}</style>\n<p>Model <code>{}</code> on {}, which reads {:.0f} GB/s. One request "
      "at a "
      "time, {} output tokens, {} repeats; variants take turns. A token reads {:.2f} GB of "
      "weights, "
      "which takes {:.3f} ms at least.</p>\n",
      EscapeHtml(report.model), EscapeHtml(report.device), report.read_bandwidth * 1e-9,
      report.output_len, report.repeats, report.weight_bytes_per_token * 1e-9,
      1e3 * report.weight_bytes_per_token / report.read_bandwidth);
  body += "<div class=\"maps\">";
  body += Plot(report, &LatencyVariant::itl, 1, "inter-token latency, ms, by context in tokens");
  body += Plot(report, &LatencyVariant::ttft, 2, "time to first token, ms, by prompt in tokens");
  body +=
      "</div>\n<h2>Fits</h2>\n<table><tr><th>variant</th><th>slope, ns per token</th><th>limit"
      "</th><th>intercept, ms</th><th>slope ratio</th><th>faster from, tokens</th><th>TTFT a "
      "ratio</th></tr>\n";
  for (const LatencyVariant& v : report.variants) {
    const bool base = &v == &report.variants[0];
    body += fmt::format(
        "<tr><td class=\"name\">{}</td><td>{}</td><td>{:.2f}</td><td>{}</td><td>{}</td><td>{}</td>"
        "<td>{}</td></tr>\n",
        EscapeHtml(v.name), WithInterval(v.slope, 1e9, 2),
        1e9 * v.cache_bytes_per_token / report.read_bandwidth, WithInterval(v.intercept, 1e3, 3),
        base ? "" : WithInterval(v.slope_ratio, 1, 3),
        base ? ""
             : fmt::format("{} [{}, {}]", Tokens(v.break_even.value),
                           Tokens(v.break_even.interval.low), Tokens(v.break_even.interval.high)),
        base ? "" : WithInterval(v.ttft_a_ratio, 1, 3));
  }
  body +=
      "</table>\n<p>In brackets 95 % intervals. Limit: cache bytes per token over the read "
      "bandwidth.</p>\n<h2>Medians</h2>\n<table><tr><th>variant</th><th>prompt</th><th>TTFT, "
      "ms</th><th>ITL, ms</th></tr>\n";
  for (size_t l = 0; l < report.variants[0].itl.size(); ++l) {
    for (const LatencyVariant& v : report.variants) {
      body += fmt::format(
          "<tr><td class=\"name\">{}</td><td>{:.0f}</td><td>{:.2f}</td><td>{:.3f}</td></tr>\n",
          EscapeHtml(v.name), v.ttft[l][0].x, 1e3 * Median(v.ttft[l]), 1e3 * Median(v.itl[l]));
    }
  }
  return HtmlPage("Latency", body + "</table>\n");
}

}  // namespace octavo
