// The one file that knows Python. Pointers and the stream come as integers: no torch header, no
// CUDA header, so one build serves every torch.
#include <pybind11/pybind11.h>

#include "add_layer_norm.h"
#include "linear_gelu.h"
#include "paged_decode.h"
#include "paged_write.h"
#include "sample.h"
#ifdef GPU_HOST
#include "host/controls.h"
#endif

namespace {

using Address = uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void paged_write(Address k, Address v, Address k_pages, Address v_pages, Address slots,
                 Address error_flag, int64_t k_token_stride, int64_t k_head_stride,
                 int64_t v_token_stride, int64_t v_head_stride, int64_t k_page_stride,
                 int64_t k_page_head_stride, int64_t k_page_slot_stride, int64_t v_page_stride,
                 int64_t v_page_head_stride, int64_t v_page_slot_stride, int64_t slots_stride,
                 int64_t tokens, int64_t pages, int kv_heads, int page_size, int row_bytes,
                 int access_bytes, bool wide_slots, Address stream) {
  launch_paged_write(
      {at<void>(k), at<void>(v), at<void>(k_pages), at<void>(v_pages), at<void>(slots),
       at<int>(error_flag), k_token_stride, k_head_stride, v_token_stride, v_head_stride,
       k_page_stride, k_page_head_stride, k_page_slot_stride, v_page_stride, v_page_head_stride,
       v_page_slot_stride, slots_stride, tokens, pages, kv_heads, page_size, row_bytes,
       access_bytes, wide_slots},
      at<void>(stream));
}

void paged_decode(Address q, Address k_pages, Address v_pages, Address page_table, Address lengths,
                  Address out, Address lse, Address part, Address part_lse, Address new_k,
                  Address new_v, Address error_flag, int64_t q_seq_stride, int64_t q_head_stride,
                  int64_t k_page_stride, int64_t k_head_stride, int64_t k_slot_stride,
                  int64_t v_page_stride, int64_t v_head_stride, int64_t v_slot_stride,
                  int64_t new_k_seq_stride, int64_t new_k_head_stride, int64_t new_v_seq_stride,
                  int64_t new_v_head_stride, int64_t table_seq_stride, int64_t table_page_stride,
                  int64_t lengths_stride, int64_t pages, int batch, int heads, int kv_heads,
                  int head_dim, int page_size, int max_pages, int window_left, int prefix_keys,
                  int slots, float scale, bool wide_table, bool wide_lengths, int dtype,
                  Address stream) {
  launch_paged_decode(
      {at<void>(q), at<void>(k_pages), at<void>(v_pages), at<void>(page_table), at<void>(lengths),
       at<void>(out), at<float>(lse), at<float>(part), at<float>(part_lse), at<void>(new_k),
       at<void>(new_v), at<int>(error_flag), q_seq_stride, q_head_stride, k_page_stride,
       k_head_stride, k_slot_stride, v_page_stride, v_head_stride, v_slot_stride, new_k_seq_stride,
       new_k_head_stride, new_v_seq_stride, new_v_head_stride, table_seq_stride, table_page_stride,
       lengths_stride, pages, batch, heads, kv_heads, head_dim, page_size, max_pages, window_left,
       prefix_keys, slots, scale, wide_table, wide_lengths, static_cast<Dtype>(dtype)},
      at<void>(stream));
}

void add_layer_norm(Address x, Address residual, Address weight, Address bias, Address y,
                    Address sum, Address seed_at, int64_t seed, int64_t rows, int64_t x_stride,
                    int64_t residual_stride, int64_t drop_below, float keep_scale, float eps,
                    int width, bool wide_weights, int dtype, Address stream) {
  launch_add_layer_norm(
      {at<void>(x), at<void>(residual), at<void>(weight), at<void>(bias), at<void>(y),
       at<void>(sum), at<const int64_t>(seed_at), seed, rows, x_stride, residual_stride, drop_below,
       keep_scale, eps, width, wide_weights, static_cast<Dtype>(dtype)},
      at<void>(stream));
}

void linear_gelu(Address x, Address w, Address b, Address y, int64_t x_stride, int64_t w_stride,
                 int rows, int inputs, int outputs, bool by_tanh, int dtype, Address stream) {
  launch_linear_gelu({at<void>(x), at<void>(w), at<void>(b), at<void>(y), x_stride, w_stride, rows,
                      inputs, outputs, by_tanh, static_cast<Dtype>(dtype)},
                     at<void>(stream));
}

void sample(Address logits, Address tokens, Address error_flag, Address temperature_at,
            float temperature, Address top_p_at, float top_p, Address min_p_at, float min_p,
            Address top_k_at, int64_t top_k, Address seed_at, int64_t seed, Address sequence_at,
            int64_t sequence, Address step_at, int64_t step, int64_t rows, int64_t row_stride,
            int vocabulary, int dtype, Address stream) {
  launch_sample({at<void>(logits), at<int64_t>(tokens), at<int>(error_flag),
                 {at<float>(temperature_at), temperature},
                 {at<float>(top_p_at), top_p},
                 {at<float>(min_p_at), min_p},
                 {at<int64_t>(top_k_at), top_k},
                 {at<int64_t>(seed_at), seed},
                 {at<int64_t>(sequence_at), sequence},
                 {at<int64_t>(step_at), step},
                 rows, row_stride, vocabulary, static_cast<Dtype>(dtype)},
                at<void>(stream));
}

}  // namespace

PYBIND11_MODULE(BERTGPT_MODULE, m) {
  m.doc() = "CUDA C++ kernels: each function takes addresses, sizes, strides and a stream.";
  m.def("paged_write", paged_write);
  m.def("paged_decode", paged_decode);
  m.def("add_layer_norm", add_layer_norm);
  m.def("linear_gelu", linear_gelu);
  m.def("sample", sample);
  m.def("count_splits", count_splits);
  m.attr("MAX_SPLITS") = kMaxSplits;
  m.attr("MIN_SPLIT_KEYS") = kMinSplitKeys;
  m.attr("MAX_LINEAR_ROWS") = kMaxLinearRows;
  m.attr("MAX_NORM_WIDTH") = kMaxNormWidth;
#ifdef GPU_HOST
  m.attr("HOST") = true;
  m.def("set_schedule", gpu_host::set_schedule);
  m.def("poison", gpu_host::poison);
  m.def("unpoison", gpu_host::unpoison);
#else
  m.attr("HOST") = false;
#endif
}
