/* safetensors: what the format allows is read, what it forbids is refused by name, and the writer's bytes are the reference writer's. */
#include "core/status.h"
#include "golden.h"
#include "io/safetensors.h"
#include "scratch.h"

#define T "\"shape\":[2],\"data_offsets\":[0,8]"
#define A "\"a\":{\"dtype\":\"F32\"," T "}"

static const struct accept_case {
    const char *what, *header;
    size_t data, tensors;
} accepts[] = {
    {"an empty file", "{}", 0, 0},
    {"one tensor", "{" A "}", 8, 1},
    {"a scalar", "{\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]}}", 4, 1},
    {"a dimension of 0", "{\"a\":{\"dtype\":\"F32\",\"shape\":[3,0],\"data_offsets\":[0,0]}}", 0, 1},
    {"a dimension of 0 between others",
     "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},"
     "\"z\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[1,1]},"
     "\"b\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1,2]}}",
     2, 3},
    {"a huge dimension beside 0", "{\"a\":{\"dtype\":\"F32\",\"shape\":[0,9223372036854775807],\"data_offsets\":[0,0]}}", 0, 1},
    {"white space in front", " \n\t{" A "}", 8, 1},
    {"white space behind", "{" A "} \n   ", 8, 1},
    {"keys of an entry in any order", "{\"a\":{\"data_offsets\":[0,8],\"shape\":[2],\"dtype\":\"F32\"}}", 8, 1},
    {"an unknown key in an entry", "{\"a\":{\"dtype\":\"F32\"," T ",\"note\":\"x\"}}", 8, 1},
    {"metadata", "{\"__metadata__\":{\"format\":\"pt\",\"who\":\"me\"}," A "}", 8, 1},
    {"tensors in any order",
     "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[4,5]},"
     "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}",
     5, 2},
    {"unaligned data",
     "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},"
     "\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[1,5]}}",
     5, 2},
    {"a dtype of the format that the library does not use", "{\"a\":{\"dtype\":\"F8_E5M2\",\"shape\":[3],\"data_offsets\":[0,3]}}", 3, 1},
    {"half bytes that fill whole ones", "{\"a\":{\"dtype\":\"F4\",\"shape\":[3,2],\"data_offsets\":[0,3]}}", 3, 1},
    {"rank 8", "{\"a\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,1,1,1,1],\"data_offsets\":[0,1]}}", 1, 1},
};

static const struct reject_case {
    const char *what, *header;
    long long claimed; /* header length in the prefix; -1 = the true one */
    size_t data;
    const char *says;
} rejects[] = {
    {"header of 100,000,001 bytes", "{}", 100000001, 0, "expected at most 100000000"},
    {"header length near 2^63", "{}", 0x7fffffffffffffff, 0, "expected at most 100000000"},
    {"header longer than the file", "{}", 3, 0, "truncated"},
    {"header cut short", "{" A "}", 5, 8, "not valid JSON"},
    {"no JSON", "hello", -1, 0, "not valid JSON"},
    {"no bytes of JSON", "", -1, 0, "not valid JSON"},
    {"a list", "[]", -1, 0, "not a JSON object"},
    {"garbage behind the JSON", "{" A "}x", -1, 8, "not valid JSON"},
    {"second object behind the JSON", "{" A "}{}", -1, 8, "not valid JSON"},
    {"not UTF-8", "{\"\xff\":{\"dtype\":\"F32\"," T "}}", -1, 8, "not valid JSON"},
    {"overlong UTF-8", "{\"\xc0\x80\":{\"dtype\":\"F32\"," T "}}", -1, 8, "not valid JSON"},
    {"NUL in a name", "{\"a\\u0000b\":{\"dtype\":\"F32\"," T "}}", -1, 8, "not valid JSON"},
    {"duplicate names", "{" A "," A "}", -1, 8, "duplicate"},
    {"metadata that is no object", "{\"__metadata__\":[]," A "}", -1, 8, "__metadata__"},
    {"metadata with a number", "{\"__metadata__\":{\"n\":1}," A "}", -1, 8, "\"n\" is not a string"},
    {"entry that is no object", "{\"a\":3}", -1, 0, "tensor a: malformed entry"},
    {"entry without dtype", "{\"a\":{" T "}}", -1, 8, "tensor a: malformed entry"},
    {"entry without shape", "{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,8]}}", -1, 8, "tensor a: malformed entry"},
    {"entry without offsets", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}", -1, 8, "tensor a: malformed entry"},
    {"unknown dtype", "{\"a\":{\"dtype\":\"F31\"," T "}}", -1, 8, "unknown dtype \"F31\""},
    {"dtype in lower case", "{\"a\":{\"dtype\":\"f32\"," T "}}", -1, 8, "unknown dtype \"f32\""},
    {"negative dimension", "{\"a\":{\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]}}", -1, 8, "dimension 0 is not a whole number"},
    {"fractional dimension", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2.0],\"data_offsets\":[0,8]}}", -1, 8,
     "dimension 0 is not a whole number"},
    {"dimension of 2^63", "{\"a\":{\"dtype\":\"F32\",\"shape\":[9223372036854775808],\"data_offsets\":[0,8]}}", -1, 8, "not valid JSON"},
    {"dimension in a string", "{\"a\":{\"dtype\":\"F32\",\"shape\":[\"2\"],\"data_offsets\":[0,8]}}", -1, 8, "dimension 0"},
    {"product past 64 bits", "{\"a\":{\"dtype\":\"U8\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,0]}}", -1, 0,
     "passes 64 bits"},
    {"bits past 64 bits", "{\"a\":{\"dtype\":\"F32\",\"shape\":[4611686018427387904],\"data_offsets\":[0,0]}}", -1, 0, "passes 64 bits"},
    {"half a byte", "{\"a\":{\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[0,2]}}", -1, 2, "12 bits, expected whole bytes"},
    {"rank 9", "{\"a\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,1]}}", -1, 1,
     "9 dimensions, expected at most 8"},
    {"one offset", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0]}}", -1, 8, "data_offsets are not two"},
    {"three offsets", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8,8]}}", -1, 8, "data_offsets are not two"},
    {"negative offset", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[-8,0]}}", -1, 8, "data_offsets are not two"},
    {"fractional offset", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8.5]}}", -1, 8, "data_offsets are not two"},
    {"end before begin", "{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}}", -1, 8, "before their begin"},
    {"span too small for the shape", "{\"a\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,8]}}", -1, 8,
     "span 8 bytes, expected 12"},
    {"span too large for the shape", "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,8]}}", -1, 8, "span 8 bytes, expected 4"},
    {"first tensor not at 0", "{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,8]}}", -1, 8, "leave a hole"},
    {"hole",
     "{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},\"b\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[2,3]}}", -1, 3,
     "tensor b begins at data byte 2, expected 1: tensors leave a hole"},
    {"overlap",
     "{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[1,3]}}", -1, 3,
     "tensor b begins at data byte 1, expected 2: tensors overlap"},
    {"two tensors on the same bytes",
     "{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},\"b\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}", -1, 2,
     "tensors overlap"},
    {"truncated data", "{" A "}", -1, 7, "7 bytes of data, expected 8: the file is truncated"},
    {"trailing bytes", "{" A "}", -1, 9, "9 bytes of data, expected 8: the file is longer"},
    {"trailing bytes behind no tensor", "{}", -1, 1, "longer than its tensors"},
    {"deep nesting", "{\"a\":[[[[1]]]]}", -1, 0, "nested 5 deep"},
};

Test(safetensors, what_the_format_allows_is_read) {
    char dir[ESPI_PATH_MAX], path[ESPI_PATH_MAX];
    scratch_make(dir);
    for (int i = 0; i < ESPI_COUNT(accepts); i++) {
        const struct accept_case *c = &accepts[i];
        scratch_safetensors(path, dir, "x.safetensors", c->header, -1, c->data);
        espi_st_file *f = NULL;
        esp_status status = espi_st_open(&f, path);
        cr_expect_eq(status, ESP_OK, "%s: %s", c->what, esp_last_error());
        if (status != ESP_OK) continue;
        cr_expect_eq(espi_st_count(f), c->tensors, "%s", c->what);
        for (size_t j = 0; j < espi_st_count(f); j++) {
            const espi_st_tensor *t = espi_st_at(f, j);
            unsigned char got[64];
            OK(espi_st_read(t, got, 0, (size_t)t->bytes));
            /* scratch_safetensors writes i*7+1 at data byte i */
            const uint64_t first = t->offset - 8 - strlen(c->header);
            for (uint64_t k = 0; k < t->bytes; k++)
                cr_expect_eq(got[k], (unsigned char)((first + k) * 7 + 1), "%s, tensor %s", c->what, t->name);
            cr_expect_eq(espi_st_find(f, t->name), t, "%s", c->what);
        }
        espi_st_close(f);
    }
    scratch_remove(dir);
}

Test(safetensors, what_it_forbids_is_refused_by_name) {
    char dir[ESPI_PATH_MAX], path[ESPI_PATH_MAX];
    scratch_make(dir);
    for (int i = 0; i < ESPI_COUNT(rejects); i++) {
        const struct reject_case *c = &rejects[i];
        scratch_safetensors(path, dir, "x.safetensors", c->header, c->claimed, c->data);
        espi_st_file *f = NULL;
        esp_status status = espi_st_open(&f, path);
        cr_expect_eq(status, ESP_ERR_FORMAT, "%s: %s", c->what, status == ESP_OK ? "taken" : esp_last_error());
        cr_expect_not_null(strstr(esp_last_error(), path), "%s: file not named: %s", c->what, esp_last_error());
        cr_expect_not_null(strstr(esp_last_error(), c->says), "%s: \"%s\" not said: %s", c->what, c->says, esp_last_error());
        if (status == ESP_OK) espi_st_close(f);
    }
    scratch_remove(dir);
}

Test(safetensors, files_without_room_for_a_header) {
    char dir[ESPI_PATH_MAX], path[ESPI_PATH_MAX];
    scratch_make(dir);
    espi_st_file *f = NULL;
    for (size_t n = 0; n < 8; n++) {
        scratch_write(path, dir, "x", "\0\0\0\0\0\0\0", n);
        cr_expect_eq(espi_st_open(&f, path), ESP_ERR_FORMAT);
        cr_expect_not_null(strstr(esp_last_error(), "expected at least 8"), "%s", esp_last_error());
    }
    cr_expect_eq(espi_st_open(&f, dir), ESP_ERR_IO, "a folder");
    OK(espi_path_join(path, dir, "absent"));
    cr_expect_eq(espi_st_open(&f, path), ESP_ERR_IO);
    cr_expect_not_null(strstr(esp_last_error(), "No such file"), "%s", esp_last_error());
    scratch_remove(dir);
}

Test(safetensors, ranges_of_a_tensor) {
    char dir[ESPI_PATH_MAX], path[ESPI_PATH_MAX];
    scratch_make(dir);
    scratch_safetensors(path, dir, "x", "{\"__metadata__\":{\"format\":\"pt\"}," A "}", -1, 8);
    espi_st_file *f = NULL;
    OK(espi_st_open(&f, path));
    const espi_st_tensor *t = espi_st_find(f, "a");
    cr_assert_not_null(t);
    unsigned char byte;
    OK(espi_st_read(t, &byte, 7, 1));
    cr_expect_eq(byte, 50);
    OK(espi_st_read(t, &byte, 8, 0));
    cr_expect_eq(espi_st_read(t, &byte, 8, 1), ESP_ERR_ARG);
    cr_expect_eq(espi_st_read(t, &byte, UINT64_MAX, 1), ESP_ERR_ARG);
    cr_expect_null(espi_st_find(f, "b"));
    cr_expect_str_eq(espi_st_metadata(f, "format"), "pt");
    cr_expect_null(espi_st_metadata(f, "other"));
    cr_expect_eq(espi_st_expect(t, ESP_F32, 1, (int64_t[]){2}), ESP_OK);
    cr_expect_eq(espi_st_expect(t, ESP_BF16, 1, (int64_t[]){2}), ESP_ERR_DTYPE);
    cr_expect_not_null(strstr(esp_last_error(), "tensor a: dtype F32, expected BF16"), "%s", esp_last_error());
    cr_expect_eq(espi_st_expect(t, ESP_F32, 2, (int64_t[]){2, 1}), ESP_ERR_SHAPE);
    cr_expect_not_null(strstr(esp_last_error(), "tensor a: shape [2], expected [2,1]"), "%s", esp_last_error());
    /* A file that shrinks under an open reader is an error, not a short answer. */
    cr_assert_eq(truncate(path, (off_t)t->offset + 3), 0);
    cr_expect_eq(espi_st_read(t, &byte, 7, 1), ESP_ERR_FORMAT);
    cr_expect_not_null(strstr(esp_last_error(), "truncated"), "%s", esp_last_error());
    espi_st_close(f);
    scratch_remove(dir);
}

/* ---- folders ---- */

#define INDEX "model.safetensors.index.json"
#define ONE(name) "{\"" name "\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}"

/* Two shards, s1 with tensor a and s2 with tensor b, under this index. */
static esp_status open_folder(espi_st_set **set, const char *dir, const char *index, const char *in_s2) {
    char path[ESPI_PATH_MAX];
    scratch_safetensors(path, dir, "s1", ONE("a"), -1, 2);
    scratch_safetensors(path, dir, "s2", in_s2, -1, 2);
    scratch_write(path, dir, INDEX, index, strlen(index));
    return espi_st_set_open(set, dir);
}

Test(safetensors, shards_by_their_index) {
    char dir[ESPI_PATH_MAX], path[ESPI_PATH_MAX];
    scratch_make(dir);
    espi_st_set *set = NULL;
    OK(open_folder(&set, dir, "{\"metadata\":{\"total_size\":4.0},\"weight_map\":{\"b\":\"s2\",\"a\":\"s1\"}}", ONE("b")));
    cr_assert_eq(espi_st_set_count(set), 2);
    cr_expect_str_eq(espi_st_set_at(set, 0)->name, "a");
    cr_expect_str_eq(espi_st_set_at(set, 1)->name, "b");
    cr_expect_eq(espi_st_set_index(set, espi_st_set_find(set, "b")), 1);
    cr_expect_not_null(strstr(espi_st_path(espi_st_set_find(set, "b")->file), "/s2"));
    cr_expect_null(espi_st_set_find(set, "c"));
    espi_st_set_close(set);
    /* A tensor that the index does not name is found and marked. */
    OK(open_folder(
        &set, dir, "{\"weight_map\":{\"a\":\"s1\",\"b\":\"s2\"}}",
        "{\"b\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},\"x\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1,2]}}"));
    cr_expect(espi_st_set_find(set, "x")->unmapped);
    cr_expect_not(espi_st_set_find(set, "b")->unmapped);
    espi_st_set_close(set);
    scratch_safetensors(path, dir, "model.safetensors", ONE("a"), -1, 2);
    cr_expect_eq(espi_st_set_open(&set, dir), ESP_ERR_FORMAT, "one file and an index: which is meant?");
    OK(espi_path_join(path, dir, INDEX));
    unlink(path);
    OK(espi_st_set_open(&set, dir));
    cr_expect_eq(espi_st_set_count(set), 1);
    espi_st_set_close(set);
    scratch_remove(dir);
}

static const struct index_case {
    const char *what, *index, *in_s2;
    esp_status status;
    const char *says;
} bad_indices[] = {
    {"tensor absent from its shard", "{\"weight_map\":{\"a\":\"s1\",\"c\":\"s2\"}}", ONE("b"), ESP_ERR_FORMAT, "tensor c is not in"},
    {"tensor in two shards", "{\"weight_map\":{\"a\":\"s1\",\"b\":\"s2\"}}",
     "{\"b\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[1,2]}}",
     ESP_ERR_FORMAT, "tensor a is in two shards"},
    {"shard in another folder", "{\"weight_map\":{\"a\":\"/etc/s1\"}}", ONE("b"), ESP_ERR_FORMAT, "expected a plain file name"},
    {"shard above", "{\"weight_map\":{\"a\":\"..\"}}", ONE("b"), ESP_ERR_FORMAT, "expected a plain file name"},
    {"shard below", "{\"weight_map\":{\"a\":\"x/s1\"}}", ONE("b"), ESP_ERR_FORMAT, "expected a plain file name"},
    {"shard without name", "{\"weight_map\":{\"a\":\"\"}}", ONE("b"), ESP_ERR_FORMAT, "expected a plain file name"},
    {"shard that is not there", "{\"weight_map\":{\"a\":\"s3\"}}", ONE("b"), ESP_ERR_IO, "s3"},
    {"shard that is no string", "{\"weight_map\":{\"a\":1}}", ONE("b"), ESP_ERR_FORMAT, "not a string"},
    {"tensor twice in the map", "{\"weight_map\":{\"a\":\"s1\",\"a\":\"s2\"}}", ONE("b"), ESP_ERR_FORMAT, "without duplicates"},
    {"no map", "{}", ONE("b"), ESP_ERR_FORMAT, "\"weight_map\" is missing"},
    {"no JSON", "weights", ONE("b"), ESP_ERR_FORMAT, "not valid JSON"},
    {"broken shard", "{\"weight_map\":{\"a\":\"s1\",\"b\":\"s2\"}}", "{}", ESP_ERR_FORMAT, "s2"},
};

Test(safetensors, a_lying_index_is_refused) {
    char dir[ESPI_PATH_MAX];
    scratch_make(dir);
    espi_st_set *set = NULL;
    for (int i = 0; i < ESPI_COUNT(bad_indices); i++) {
        const struct index_case *c = &bad_indices[i];
        cr_expect_eq(open_folder(&set, dir, c->index, c->in_s2), c->status, "%s: %s", c->what, esp_last_error());
        cr_expect_not_null(strstr(esp_last_error(), c->says), "%s: \"%s\" not said: %s", c->what, c->says, esp_last_error());
    }
    scratch_remove(dir);
    scratch_make(dir);
    cr_expect_eq(espi_st_set_open(&set, dir), ESP_ERR_IO, "an empty folder");
    cr_expect_not_null(strstr(esp_last_error(), "neither"), "%s", esp_last_error());
    scratch_remove(dir);
}

/* ---- the writer ---- */

static esp_status fill_from_file(void *user, void *buffer, size_t bytes) {
    return espi_st_read(user, buffer, 0, bytes);
}

/* Files of the reference writer, read and written again, tensors in reverse order: the same bytes. */
Test(safetensors, writes_what_the_reference_writer_writes) {
    static const char *const files[] = {"q3a/model_nf4_dq/model.safetensors", "q3c/model/model.safetensors", "q3a/ref.safetensors"};
    char dir[ESPI_PATH_MAX], path[ESPI_PATH_MAX];
    scratch_make(dir);
    for (int i = 0; i < ESPI_COUNT(files); i++) {
        espi_st_file *f = golden_open(files[i]);
        const size_t n = espi_st_count(f);
        espi_st_item *items = calloc(n, sizeof *items);
        cr_assert_not_null(items);
        for (size_t j = 0; j < n; j++) {
            const espi_st_tensor *t = espi_st_at(f, n - 1 - j);
            items[j] = (espi_st_item){.name = t->name, .dtype = t->dtype, .rank = t->rank, .fill = fill_from_file, .user = (void *)t};
            memcpy(items[j].dims, t->dims, sizeof t->dims);
        }
        OK(espi_path_join(path, dir, "again"));
        OK(espi_st_write(path, items, n));
        char *got, *expected;
        size_t got_bytes, expected_bytes;
        OK(espi_file_read_all(&got, &got_bytes, path, SIZE_MAX));
        OK(espi_file_read_all(&expected, &expected_bytes, espi_st_path(f), SIZE_MAX));
        if (espi_st_metadata(f, "format")) {
            cr_expect_eq(got_bytes, expected_bytes, "%s", files[i]);
            cr_expect(got_bytes == expected_bytes && memcmp(got, expected, got_bytes) == 0, "%s: other bytes", files[i]);
        } else {
            espi_st_file *again = NULL; /* written without metadata, which ours always has: compare the data */
            OK(espi_st_open(&again, path));
            const size_t a = (size_t)espi_st_at(again, 0)->offset, b = (size_t)espi_st_at(f, 0)->offset;
            cr_expect_eq(memcmp(got + a, expected + b, (size_t)espi_st_at(f, 0)->bytes), 0, "%s: other data", files[i]);
            espi_st_close(again);
        }
        free(got);
        free(expected);
        free(items);
        espi_st_close(f);
    }
    cr_expect_eq(scratch_count(dir), 1, "temporary files are left");
    scratch_remove(dir);
}

static esp_status fail_to_fill(void *user, void *buffer, size_t bytes) {
    (void)user, (void)buffer, (void)bytes;
    return ESPI_FAIL(ESP_ERR_CALLBACK, "no values");
}

Test(safetensors, the_writer_refuses_what_no_reader_would_take) {
    char dir[ESPI_PATH_MAX], path[ESPI_PATH_MAX];
    scratch_make(dir);
    scratch_write(path, dir, "x", "old", 3);
    const float values[2] = {1, 2};
    espi_st_item items[2] = {{.name = "a", .dtype = ESP_F32, .rank = 1, .dims = {2}, .data = values},
                             {.name = "a", .dtype = ESP_U8, .rank = 1, .dims = {2}, .data = values}};
    cr_expect_eq(espi_st_write(path, items, 2), ESP_ERR_ARG, "a name twice, with two dtypes");
    items[1].name = "__metadata__";
    cr_expect_eq(espi_st_write(path, items, 2), ESP_ERR_ARG, "the reserved name");
    items[1].name = "b";
    items[1].dims[0] = -1;
    cr_expect_eq(espi_st_write(path, items, 2), ESP_ERR_ARG, "a negative dimension");
    items[1].dims[0] = 2;
    items[1].dtype = ESP_DTYPE_NONE;
    cr_expect_eq(espi_st_write(path, items, 2), ESP_ERR_ARG, "no dtype");
    items[1].dtype = ESP_U8;
    items[1].rank = 9;
    cr_expect_eq(espi_st_write(path, items, 2), ESP_ERR_ARG, "rank 9");
    items[1].rank = 1;
    items[1].data = NULL;
    items[1].fill = fail_to_fill;
    cr_expect_eq(espi_st_write(path, items, 2), ESP_ERR_CALLBACK, "a callback that fails");
    char *text;
    OK(espi_file_read_all(&text, NULL, path, 100));
    cr_expect_str_eq(text, "old", "a failed write has touched the old file");
    cr_expect_eq(scratch_count(dir), 1, "temporary files are left");
    free(text);
    OK(espi_st_write(path, NULL, 0));
    espi_st_file *f = NULL;
    OK(espi_st_open(&f, path));
    cr_expect_eq(espi_st_count(f), 0);
    espi_st_close(f);
    scratch_remove(dir);
}
