/* dtypes and views. */
#include "espalier/tensor.h"

#include <criterion/criterion.h>

Test(tensor, dtypes_as_safetensors_spells_them) {
    static const struct {
        esp_dtype dtype;
        const char *name;
        size_t size;
    } rows[] = {{ESP_F32, "F32", 4}, {ESP_F64, "F64", 8}, {ESP_BF16, "BF16", 2}, {ESP_F16, "F16", 2},        {ESP_I32, "I32", 4},
                {ESP_I64, "I64", 8}, {ESP_U8, "U8", 1},   {ESP_I8, "I8", 1},     {ESP_BOOL, "BOOL", 1},      {ESP_I16, "I16", 2},
                {ESP_U16, "U16", 2}, {ESP_U32, "U32", 4}, {ESP_U64, "U64", 8},   {ESP_F8_E4M3, "F8_E4M3", 1}};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        cr_expect_str_eq(esp_dtype_name(rows[i].dtype), rows[i].name);
        cr_expect_eq(esp_dtype_size(rows[i].dtype), rows[i].size, "%s", rows[i].name);
    }
    static const int unknown[] = {0, 15, -1};
    for (int i = 0; i < 3; i++) {
        cr_expect_str_eq(esp_dtype_name((esp_dtype)unknown[i]), "?");
        cr_expect_eq(esp_dtype_size((esp_dtype)unknown[i]), 0);
    }
}

Test(tensor, view_is_row_major) {
    float data[24];
    esp_tensor t = esp_tensor_view(data, ESP_F32, 3, (int64_t[]){2, 3, 4});
    cr_expect(t.data == data && t.rank == 3 && t.dtype == ESP_F32);
    cr_expect(t.strides[0] == 12 && t.strides[1] == 4 && t.strides[2] == 1);
    cr_expect_eq(esp_tensor_count(&t), 24);
}

Test(tensor, edge_ranks) {
    float x;
    esp_tensor scalar = esp_tensor_view(&x, ESP_F32, 0, NULL);
    cr_expect(scalar.rank == 0 && scalar.data == &x && esp_tensor_count(&scalar) == 1);
    esp_tensor empty = esp_tensor_view(&x, ESP_F32, 2, (int64_t[]){0, 5});
    cr_expect(empty.strides[0] == 5 && esp_tensor_count(&empty) == 0);
    esp_tensor deep = esp_tensor_view(&x, ESP_F32, ESP_MAX_RANK + 1, (int64_t[]){1, 1, 1, 1, 1, 1, 1, 1, 1});
    cr_expect(deep.rank == -1 && deep.data == NULL);
    cr_expect_eq(esp_tensor_view(&x, ESP_F32, -1, NULL).rank, -1);
}
