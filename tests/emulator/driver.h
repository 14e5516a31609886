// Arguments of the emulator's drivers: arrays as raw files in a folder, integers on the command line.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

struct Driver {
  std::string folder, command;
  std::vector<long long> numbers;

  // driver FOLDER SEED COMMAND NUMBERS...
  Driver(int argc, char** argv) : folder(argv[1]), command(argv[3]) {
    emulator::seed(static_cast<unsigned>(std::atoi(argv[2])));
    for (int i = 4; i < argc; ++i) numbers.push_back(std::atoll(argv[i]));
  }

  long long operator[](std::size_t index) const { return numbers.at(index); }

  // A heap block of the file's exact size, so that the address sanitizer sees the first access beyond it.
  template <class T>
  std::vector<T> read(const std::string& name) const {
    std::FILE* file = std::fopen((folder + "/" + name).c_str(), "rb");
    if (file == nullptr) return {};
    std::fseek(file, 0, SEEK_END);
    std::vector<T> values(static_cast<std::size_t>(std::ftell(file)) / sizeof(T));
    std::rewind(file);
    if (!values.empty() && std::fread(values.data(), sizeof(T), values.size(), file) != values.size()) std::abort();
    std::fclose(file);
    return values;
  }

  template <class T>
  void write(const std::string& name, const std::vector<T>& values) const {
    std::FILE* file = std::fopen((folder + "/" + name).c_str(), "wb");
    if (file == nullptr) std::abort();
    if (!values.empty() && std::fwrite(values.data(), sizeof(T), values.size(), file) != values.size()) std::abort();
    std::fclose(file);
  }
};

template <class T>
T* data_or_null(std::vector<T>& values) {
  return values.empty() ? nullptr : values.data();
}
