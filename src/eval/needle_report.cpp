// How the results of the needle evaluation are shown: a table, JSON, a page.
#include <algorithm>
#include <cmath>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "eval/html.h"
#include "eval/needle.h"

namespace octavo {
namespace {

std::string LengthName(int64_t tokens) {
  return tokens % 1024 == 0 ? fmt::format("{}k", tokens / 1024) : std::to_string(tokens);
}

double Rate(const NeedleCell& cell) {
  return cell.asked ? static_cast<double>(cell.exact) / cell.asked : 0;
}
double MeanLogprob(const NeedleCell& cell) {
  return cell.asked ? cell.logprob_sum / cell.asked : 0;
}

// White at 1, through yellow, to red at 0: failures must catch the eye.
std::string HeatColour(double rate) {
  const int green = static_cast<int>(std::lround(90 + 150 * rate));
  const int blue = static_cast<int>(std::lround(80 + 160 * std::pow(rate, 3)));
  return rate >= 0.9999 ? "#e3f4e1" : fmt::format("rgb(240,{},{})", green, blue);
}

// Where attention's output is worst, and the median over all heads.
struct ErrorSummary {
  double median = 0, worst = 0;
  size_t layer = 0, head = 0;
};
ErrorSummary Summarise(const HeadErrors& errors) {
  ErrorSummary summary;
  std::vector<double> all;
  for (size_t l = 0; l < errors.size(); ++l) {
    for (size_t h = 0; h < errors[l].size(); ++h) {
      all.push_back(errors[l][h]);
      if (errors[l][h] > summary.worst) summary = {.worst = errors[l][h], .layer = l, .head = h};
    }
  }
  std::nth_element(all.begin(), all.begin() + all.size() / 2, all.end());
  summary.median = all[all.size() / 2];
  return summary;
}

bool HasErrors(const NeedleReport& report) { return !report.rows[0].attention_error.empty(); }

std::string ErrorMap(const NeedleRow& row) {
  const HeadErrors& errors = row.attention_error;
  size_t heads = 0;
  for (const auto& layer : errors) heads = std::max(heads, layer.size());
  std::string out = fmt::format(
      "<figure><figcaption>{}, {}</figcaption><table class=\"heat dense\"><tr><th>layer</th>",
      EscapeHtml(row.format), LengthName(row.length));
  for (size_t h = 0; h < heads; ++h) out += fmt::format("<th>{}</th>", h);
  out += "</tr>\n";
  for (size_t l = 0; l < errors.size(); ++l) {
    out += fmt::format("<tr><th>{}</th>", l);
    for (size_t h = 0; h < errors[l].size(); ++h) {
      const double error = errors[l][h];
      // From 0.1 % to 10 %, by its logarithm.
      const double good = std::clamp(-(std::log10(std::max(error, 1e-9)) + 1) / 2, 0.0, 1.0);
      out += fmt::format("<td style=\"background:{}\" title=\"layer {}, head {}: {:.4f}%\">{}</td>",
                         HeatColour(good), l, h, 100 * error,
                         error == 0 ? "0" : fmt::format("{:.1f}", 100 * error));
    }
    out += "</tr>\n";
  }
  return out + "</table></figure>\n";
}

std::string HeatMap(const NeedleReport& report, const std::string& format) {
  std::string out =
      fmt::format("<figure><figcaption>{}</figcaption><table class=\"heat\"><tr><th>depth</th>",
                  EscapeHtml(format));
  std::vector<const NeedleRow*> rows;
  for (const NeedleRow& row : report.rows) {
    if (row.format == format) rows.push_back(&row);
  }
  for (const NeedleRow* row : rows) out += fmt::format("<th>{}</th>", LengthName(row->length));
  out += "</tr>\n";
  for (int depth = 0; depth < report.needles; ++depth) {
    out += fmt::format("<tr><th>{:.0f}%</th>", 100 * (depth + 0.5) / report.needles);
    for (const NeedleRow* row : rows) {
      const NeedleCell& cell = row->depths[depth];
      out += fmt::format(
          "<td style=\"background:{}\" title=\"{} of {} exact, mean log-probability "
          "{:.4f}\">{}/{}</td>",
          HeatColour(Rate(cell)), cell.exact, cell.asked, MeanLogprob(cell), cell.exact,
          cell.asked);
    }
    out += "</tr>\n";
  }
  return out + "</table></figure>\n";
}

}  // namespace

std::string NeedleTable(const NeedleReport& report) {
  std::string out =
      fmt::format("{:<20} {:>8} {:>16} {:>12} {:>14} {:>14} {:>13}\n", "format", "context",
                  "exact match", "log-prob", "bytes/token", "prefill tok/s", "decode tok/s");
  for (const NeedleRow& row : report.rows) {
    const NeedleCell total = row.Total();
    out += fmt::format("{:<20} {:>8} {:>16} {:>12.5f} {:>14.0f} {:>14.0f} {:>13.1f}\n", row.format,
                       LengthName(row.length),
                       fmt::format("{:.1f}% ({}/{})", 100 * Rate(total), total.exact, total.asked),
                       MeanLogprob(total), row.cache_bytes_per_token, row.prefill_tokens_per_second,
                       row.decode_tokens_per_second);
  }
  if (!HasErrors(report)) return out;
  out += fmt::format(
      "\nattention's output against a bf16 cache: relative L2 error of each layer's heads at the "
      "last {} positions,\nevery layer given the inputs of the bf16 run\n{:<20} {:>8} {:>9} "
      "{:>9}\n",
      kAttentionErrorPositions, "format", "context", "median", "worst");
  for (const NeedleRow& row : report.rows) {
    const ErrorSummary error = Summarise(row.attention_error);
    out += fmt::format(
        "{:<20} {:>8} {:>8.3f}% {:>8.3f}%{}\n", row.format, LengthName(row.length),
        100 * error.median, 100 * error.worst,
        error.worst == 0 ? "" : fmt::format("  layer {}, head {}", error.layer, error.head));
  }
  return out;
}

std::string NeedleJson(const NeedleReport& report) {
  nlohmann::ordered_json json = {{"model", report.model},
                                 {"needles", report.needles},
                                 {"samples", report.samples},
                                 {"seed", report.seed},
                                 {"results", nlohmann::ordered_json::array()}};
  for (const NeedleRow& row : report.rows) {
    nlohmann::ordered_json depths = nlohmann::ordered_json::array();
    for (size_t i = 0; i < row.depths.size(); ++i) {
      depths.push_back({{"depth", (i + 0.5) / report.needles},
                        {"asked", row.depths[i].asked},
                        {"exact", row.depths[i].exact},
                        {"mean_logprob", MeanLogprob(row.depths[i])}});
    }
    const NeedleCell total = row.Total();
    json["results"].push_back({{"kv_cache_dtype", row.format},
                               {"context", row.length},
                               {"asked", total.asked},
                               {"exact_match", Rate(total)},
                               {"mean_logprob", MeanLogprob(total)},
                               {"cache_bytes_per_token", row.cache_bytes_per_token},
                               {"prefill_tokens_per_second", row.prefill_tokens_per_second},
                               {"decode_tokens_per_second", row.decode_tokens_per_second},
                               {"depths", depths}});
    if (HasErrors(report)) {
      const ErrorSummary error = Summarise(row.attention_error);
      json["results"].back()["attention_error"] = {{"reference", "bf16"},
                                                   {"positions", kAttentionErrorPositions},
                                                   {"median", error.median},
                                                   {"worst", error.worst},
                                                   {"layers", row.attention_error}};
    }
  }
  return json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

std::string NeedleHtml(const NeedleReport& report) {
  std::string body = fmt::format(
      "<p>Model <code>{}</code>. {} needles at even depths in each haystack, {} haystack{} per "
      "length, seed {}. Each needle is "
      "asked for on its own; an answer counts if it is exactly right. The log-probability is the "
      "mean over the right "
      "answer's tokens: it falls before answers break.</p>\n",
      EscapeHtml(report.model), report.needles, report.samples, report.samples == 1 ? "" : "s",
      report.seed);
  body +=
      "<table><tr><th>format</th><th>context</th><th>exact "
      "match</th><th>log-probability</th><th>cache bytes per token</th>"
      "<th>prefill tokens/s</th><th>decode tokens/s</th></tr>\n";
  for (const NeedleRow& row : report.rows) {
    const NeedleCell total = row.Total();
    body += fmt::format(
        "<tr><td class=\"name\">{}</td><td>{}</td><td>{:.1f}% "
        "({}/{})</td><td>{:.5f}</td><td>{:.0f}</td><td>{:.0f}</td>"
        "<td>{:.1f}</td></tr>\n",
        EscapeHtml(row.format), LengthName(row.length), 100 * Rate(total), total.exact, total.asked,
        MeanLogprob(total), row.cache_bytes_per_token, row.prefill_tokens_per_second,
        row.decode_tokens_per_second);
  }
  body += "</table>\n<h2>Exact answers by depth and length</h2>\n<div class=\"maps\">\n";
  for (const std::string& format : report.formats) body += HeatMap(report, format);
  body += "</div>\n";
  if (HasErrors(report)) {
    body += fmt::format(
        "<h2>Error of attention's output by layer and head</h2>\n<p>Percent: relative L2 against a "
        "bf16 cache at the last {} positions of one prompt per length, every layer given the "
        "inputs "
        "of the bf16 run, so that its error is its own.</p>\n<div class=\"maps\">\n",
        kAttentionErrorPositions);
    for (const NeedleRow& row : report.rows) body += ErrorMap(row);
    body += "</div>\n";
  }
  return HtmlPage("Needles in haystacks", body);
}

}  // namespace octavo
