// Checks of arguments that every device shares; each message names the argument, what was wanted and what came.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <ostream>

namespace sparse_heads {

// An argument, or one item of a list argument; worded only when a check fails.
struct ArgumentName {
  const char* argument;
  int64_t index = -1;
};

inline std::ostream& operator<<(std::ostream& stream, const ArgumentName& name) {
  stream << name.argument;
  return name.index < 0 ? stream : stream << "[" << name.index << "]";
}

inline void check_equal(ArgumentName name, const char* what, int64_t got, int64_t wanted) {
  STD_TORCH_CHECK(got == wanted, name, ": wanted ", what, " ", wanted, ", got ", got);
}

inline void check_at_least(ArgumentName name, const char* what, int64_t got, int64_t least) {
  STD_TORCH_CHECK(got >= least, name, ": wanted ", what, " of at least ", least, ", got ", got);
}

inline void check_head_dim(int64_t head_dim) {
  STD_TORCH_CHECK(head_dim > 0, "head_dim: wanted a positive number of columns per head, got ", head_dim);
}

inline void check_whole_heads(ArgumentName name, const char* what, int64_t size, int64_t head_dim) {
  STD_TORCH_CHECK(size % head_dim == 0, name, ": wanted ", what, " divisible by head_dim ", head_dim, ", got ", size);
}

// `kept` must be ascending, without repeats, within [0, heads).
inline void check_kept(ArgumentName name, const int64_t* kept, int64_t count, int64_t heads) {
  int64_t previous = -1;
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(
        kept[i] > previous && kept[i] < heads, name, ": wanted ascending head indices from 0 to ", heads - 1, ", got ",
        kept[i], " at position ", i);
    previous = kept[i];
  }
}

}  // namespace sparse_heads
