// Environment variables that native code reads, by the rules of losa_kernels/settings.py, which documents them.
#pragma once

#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace losa {

inline bool is_space(char c) {
  return c == ' ' || (c >= '\t' && c <= '\r');
}

// Whether text, without the spaces around it and in any case, is the lower-case word.
inline bool is_word(const char* text, const char* word) {
  while (is_space(*text)) ++text;
  for (; *word != '\0'; ++text, ++word) {
    const char lower = *text >= 'A' && *text <= 'Z' ? static_cast<char>(*text - 'A' + 'a') : *text;
    if (lower != *word) return false;
  }
  while (is_space(*text)) ++text;
  return *text == '\0';
}

// Which of the words (lower case, the default first) the variable has; 0 where it is not set or empty. Throws what
// settings.py would raise: the variable, what was expected, what it got.
inline int setting(const char* name, std::initializer_list<const char*> words) {
  const char* const text = std::getenv(name);
  if (text == nullptr || is_word(text, "")) return 0;
  int place = 0;
  for (const char* word : words) {
    if (is_word(text, word)) return place;
    ++place;
  }
  std::string expected;
  for (const char* word : words) {
    --place;
    expected += std::string(word) + (place > 1 ? ", " : place == 1 ? " or " : "");
  }
  throw std::invalid_argument(std::string(name) + ": expected " + expected + ", got '" + text + "'");
}

}  // namespace losa
