/* Checkpoints of one rank and of several: see checkpoint.h. */
#include "core/ctx.h"
#include "core/status.h"
#include "io/checkpoint_file.h"
#include "io/folder.h"

#include <inttypes.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#define MANIFEST "manifest"
#define MANIFEST_VERSION 1
#define PART_PREFIX "part-"
#define PART_NAME 64
#define TAG_DIGITS 16

struct espi_checkpoint {
    espi_saved_file file;
    json_t *manifest; /* NULL: all is in that file */
};

/* What a rank has of one array, as all ranks are told. */
typedef struct row {
    int64_t first, count, total;
    uint64_t name, hash; /* of its name and dtype; of its values */
} row;

/* A save by several ranks. */
typedef struct save {
    const char *path;
    const espi_share *share;
    const espi_saved_array *arrays;
    size_t n;
    row *rows; /* [ranks, n] */
    uint64_t tag;
} save;

/* Those that every rank has alike in host memory are in the manifest's file. */
static bool in_manifest(const espi_saved_array *a) {
    return a->total == 0 && !a->ctx;
}

static esp_status agree(const espi_share *share, const char *what, esp_status mine) {
    return espi_comm_agree(share->comm, (espi_place){what, -1}, mine);
}

static void part_name(char out[PART_NAME], uint64_t tag, int rank) {
    snprintf(out, PART_NAME, PART_PREFIX "%016" PRIx64 "-%d.h5", tag, rank);
}

/* The path of a file in the folder of `path`. */
static esp_status beside(char out[ESPI_PATH_MAX], const char *path, const char *name) {
    const char *slash = strrchr(path, '/');
    const int length = snprintf(out, ESPI_PATH_MAX, "%.*s%s", slash ? (int)(slash - path) + 1 : 0, path, name);
    if (length < 0 || length >= ESPI_PATH_MAX)
        return ESPI_FAIL(ESP_ERR_ARG, "path %.100s...: longer than %d bytes, use a shorter one", path, ESPI_PATH_MAX - PART_NAME);
    return ESP_OK;
}

/* ---- what no checkpoint needs any more ---- */

static bool has_tag(const uint64_t *tags, size_t n, uint64_t tag) {
    bool found = false;
    for (size_t i = 0; i < n; i++) found = found || tags[i] == tag;
    return found;
}

static esp_status sweep_names(const char *path, char **names, size_t n, uint64_t *live) {
    char file[ESPI_PATH_MAX];
    size_t n_live = 0;
    for (size_t i = 0; i < n; i++) {
        const char *end = strrchr(names[i], '.');
        ESPI_TRY(beside(file, path, names[i]));
        if (end && strcmp(end, ".h5") == 0 && strncmp(names[i], PART_PREFIX, strlen(PART_PREFIX)) != 0)
            n_live += espi_saved_file_tag(&live[n_live], file);
    }
    for (size_t i = 0; i < n; i++) {
        const char *digits = names[i] + strlen(PART_PREFIX);
        if (strncmp(names[i], PART_PREFIX, strlen(PART_PREFIX)) != 0 || strspn(digits, "0123456789abcdef") != TAG_DIGITS) continue;
        if (has_tag(live, n_live, strtoull(digits, NULL, 16))) continue;
        ESPI_TRY(beside(file, path, names[i]));
        espi_file_remove(file);
    }
    return ESP_OK;
}

/* Parts, and what a killed writer left of them, that no file in the folder names. */
static esp_status sweep(const char *path) {
    char folder[ESPI_PATH_MAX], **names;
    size_t n;
    ESPI_TRY(beside(folder, path, "."));
    ESPI_TRY(espi_folder_list(&names, &n, folder));
    uint64_t *live = calloc(n + 1, sizeof *live);
    const esp_status status = live ? sweep_names(path, names, n, live) : ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for %zu names", path, n);
    free(live);
    espi_folder_list_free(names, n);
    return status;
}

void espi_checkpoint_remove(const char *path) {
    espi_file_remove(path);
    (void)sweep(path); /* what stays goes with the next save */
}

/* ---- writing ---- */

static esp_status describe(row *r, const espi_saved_array *a, const char *path) {
    espi_saved_array host;
    void *copy;
    const uint64_t dtype = (uint64_t)a->dtype;
    *r = (row){
        .first = a->first, .count = a->count, .total = a->total ? a->total : a->count, .name = XXH64(a->name, strlen(a->name), dtype)};
    const esp_status status = espi_saved_on_host(&host, &copy, a, path);
    if (status == ESP_OK && a->count > 0) r->hash = XXH64(host.data, (size_t)a->count * esp_dtype_size(a->dtype), 0);
    free(copy);
    return status;
}

static const row *row_of(const save *s, int rank, size_t array) {
    return &s->rows[(size_t)rank * s->n + array];
}

/* Does this rank hold what `r` says? */
static bool holds(const save *s, int rank, size_t array, const row *r) {
    const row *other = row_of(s, rank, array);
    return other->count > 0 && other->first == r->first && other->count == r->count;
}

/* Values that are held, once for every holder of the same ones: the whole, and equal where they should be. */
static esp_status check_array(const save *s, size_t array) {
    const char *name = s->arrays[array].name;
    int64_t covered = 0, total = 0;
    for (int p = 0; p < s->share->ranks; p++) {
        const row *a = row_of(s, p, array);
        if (a->name != row_of(s, 0, array)->name)
            return ESPI_FAIL(ESP_ERR_MISMATCH, "%s: array \"%s\": rank %d has another one in its place, expected the same on all ranks",
                             s->path, name, p);
        if (a->count == 0) continue;
        int first = 0;
        while (!holds(s, first, array, a)) first++;
        if (row_of(s, first, array)->hash != a->hash)
            return ESPI_FAIL(
                ESP_ERR_MISMATCH,
                "%s: array \"%s\": ranks %d and %d hold different values, expected the same: they have drifted apart, go on from "
                "the checkpoint before",
                s->path, name, first, p);
        if (first == p) covered += a->count;
        total = a->total;
    }
    if (covered == total) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_INTERNAL, "%s: array \"%s\": the ranks hold %lld of its %lld values", s->path, name, (long long)covered,
                     (long long)total);
}

/* Who writes what this rank holds: of the holders, one array after the other. */
static int writer_of(const save *s, size_t array, const row *r) {
    int holders = 0, writer = -1;
    for (int p = 0; p < s->share->ranks; p++) holders += holds(s, p, array, r);
    for (int p = 0, at = 0; p < s->share->ranks && writer < 0; p++)
        if (holds(s, p, array, r) && at++ == (int)(array % (size_t)holders)) writer = p;
    return writer;
}

/* rank's arrays of its part: out [n], may be NULL. */
static size_t part_arrays(espi_saved_array *out, const save *s, int rank) {
    size_t n = 0;
    for (size_t i = 0; i < s->n; i++) {
        const row *r = row_of(s, rank, i);
        if (in_manifest(&s->arrays[i]) || r->count == 0 || writer_of(s, i, r) != rank) continue;
        if (out) out[n] = s->arrays[i];
        n++;
    }
    return n;
}

/* What all ranks are told of a part. */
typedef struct part {
    uint64_t bytes, hash;
} part;

static esp_status write_part(part *out, const save *s) {
    char name[PART_NAME], path[ESPI_PATH_MAX];
    part_name(name, s->tag, s->share->rank);
    ESPI_TRY(beside(path, s->path, name));
    espi_saved_array *arrays = calloc(s->n + 1, sizeof *arrays);
    if (!arrays) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for a list of %zu arrays", path, s->n);
    const size_t n = part_arrays(arrays, s, s->share->rank);
    const esp_status status = espi_saved_file_write(&out->hash, &out->bytes, path, arrays, n, NULL);
    free(arrays);
    return status;
}

static json_t *describe_parts(const save *s, const part *parts) {
    json_t *list = json_array();
    for (int r = 0; r < s->share->ranks; r++) {
        char name[PART_NAME], hash[TAG_DIGITS + 1];
        part_name(name, s->tag, r);
        snprintf(hash, sizeof hash, "%016" PRIx64, parts[r].hash);
        json_array_append_new(list, json_pack("{s:s, s:I, s:s}", "file", name, "bytes", (json_int_t)parts[r].bytes, "checksum", hash));
    }
    return list;
}

/* [part, first value, how many] of every piece. */
static json_t *describe_pieces(const save *s, size_t array) {
    json_t *pieces = json_array();
    for (int p = 0; p < s->share->ranks; p++) {
        const row *r = row_of(s, p, array);
        if (r->count > 0 && writer_of(s, array, r) == p)
            json_array_append_new(pieces, json_pack("[i, I, I]", p, (json_int_t)r->first, (json_int_t)r->count));
    }
    return pieces;
}

static char *manifest_text(const save *s, const part *parts) {
    json_t *arrays = json_object();
    for (size_t i = 0; i < s->n; i++) {
        int64_t total = 0;
        for (int p = 0; p < s->share->ranks; p++)
            if (row_of(s, p, i)->count > 0) total = row_of(s, p, i)->total;
        if (!in_manifest(&s->arrays[i]))
            json_object_set_new(arrays, s->arrays[i].name,
                                json_pack("{s:s, s:I, s:o}", "dtype", esp_dtype_name(s->arrays[i].dtype), "values", (json_int_t)total,
                                          "pieces", describe_pieces(s, i)));
    }
    json_t *root = json_pack("{s:i, s:o, s:o}", "version", MANIFEST_VERSION, "parts", describe_parts(s, parts), "arrays", arrays);
    char *text = root ? json_dumps(root, JSON_COMPACT) : NULL;
    json_decref(root);
    return text;
}

static esp_status write_manifest(const save *s, const part *parts) {
    uint64_t hash, bytes;
    size_t n = 0;
    char *text = manifest_text(s, parts);
    espi_saved_array *arrays = calloc(s->n + 1, sizeof *arrays);
    esp_status status = text && arrays ? ESP_OK : ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for the manifest", s->path);
    if (status == ESP_OK) {
        arrays[n++] = (espi_saved_array){.name = MANIFEST, .dtype = ESP_U8, .count = (int64_t)strlen(text), .data = text};
        for (size_t i = 0; i < s->n; i++)
            if (in_manifest(&s->arrays[i])) arrays[n++] = s->arrays[i];
        status = espi_saved_file_write(&hash, &bytes, s->path, arrays, n, &s->tag);
    }
    free(arrays);
    free(text);
    return status;
}

/* All parts are on the disk before anybody writes of them. */
static esp_status write_parts(const save *s) {
    const espi_share *share = s->share;
    part mine = {0}, *all = calloc((size_t)share->ranks, sizeof *all);
    esp_status status = all ? write_part(&mine, s) : ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for a list of parts", s->path);
    status = agree(share, "the parts of a checkpoint", status);
    if (status == ESP_OK) status = espi_comm_gather(share->comm, (espi_place){"sizes of parts", -1}, all, &mine, sizeof mine);
    if (status == ESP_OK && share->rank == 0) status = write_manifest(s, all);
    free(all);
    return agree(share, "the manifest of a checkpoint", status);
}

static esp_status write_ranks(save *s) {
    const espi_share *share = s->share;
    const size_t bytes = s->n * sizeof(row);
    row *mine = calloc(s->n + 1, sizeof *mine);
    s->rows = calloc((size_t)share->ranks * s->n + 1, sizeof *s->rows);
    esp_status status = mine && s->rows ? ESP_OK : ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for a list of %zu arrays", s->path, s->n);
    for (size_t i = 0; i < s->n && status == ESP_OK; i++) status = describe(&mine[i], &s->arrays[i], s->path);
    status = agree(share, "the arrays of a checkpoint", status);
    if (status == ESP_OK) status = espi_comm_same(share->comm, "the number of a checkpoint's arrays", s->n);
    if (status == ESP_OK) status = espi_comm_gather(share->comm, (espi_place){"checksums of arrays", -1}, s->rows, mine, bytes);
    free(mine);
    /* The same table everywhere: so is the verdict. */
    for (size_t i = 0; i < s->n && status == ESP_OK; i++) status = check_array(s, i);
    if (status == ESP_OK) {
        s->tag = XXH64(s->rows, (size_t)share->ranks * bytes, 0);
        status = write_parts(s);
    }
    free(s->rows);
    return status;
}

esp_status espi_checkpoint_write(const char *path, const espi_saved_array *arrays, size_t n, const espi_share *share) {
    if (share && share->ranks > 1) {
        save s = {.path = path, .share = share, .arrays = arrays, .n = n};
        ESPI_TRY(write_ranks(&s));
        if (share->rank != 0) return ESP_OK;
    } else {
        uint64_t hash, bytes;
        ESPI_TRY(espi_saved_file_write(&hash, &bytes, path, arrays, n, NULL));
    }
    (void)sweep(path); /* the checkpoint is there; what stays goes with the next */
    return ESP_OK;
}

/* ---- reading ---- */

static esp_status read_manifest(espi_checkpoint *c) {
    const char *path = c->file.path;
    int64_t bytes, version;
    ESPI_TRY(espi_saved_file_count(&bytes, &c->file, MANIFEST, ESP_U8));
    char *text = malloc((size_t)bytes + 1);
    if (!text) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for its manifest of %lld bytes", path, (long long)bytes);
    const esp_status status = espi_saved_file_read(&c->file, text, MANIFEST, ESP_U8, 0, bytes, bytes);
    if (status == ESP_OK) c->manifest = json_loadb(text, (size_t)bytes, JSON_REJECT_DUPLICATES, NULL);
    free(text);
    ESPI_TRY(status);
    if (!json_is_array(json_object_get(c->manifest, "parts")) || !json_is_object(json_object_get(c->manifest, "arrays")))
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: its manifest has no parts or no arrays, expected both", path);
    version = json_integer_value(json_object_get(c->manifest, "version"));
    if (version != MANIFEST_VERSION)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: got a manifest of version %lld, expected %d", path, (long long)version,
                         MANIFEST_VERSION);
    return ESP_OK;
}

esp_status espi_checkpoint_open(espi_checkpoint **checkpoint, const char *path) {
    *checkpoint = NULL;
    espi_checkpoint *c = calloc(1, sizeof *c);
    if (!c) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for a checkpoint's bookkeeping", path);
    esp_status status = espi_saved_file_open(&c->file, path);
    if (status == ESP_OK && c->file.tagged) status = read_manifest(c);
    if (status != ESP_OK) {
        espi_checkpoint_close(c);
        return status;
    }
    *checkpoint = c;
    return ESP_OK;
}

void espi_checkpoint_close(espi_checkpoint *checkpoint) {
    if (!checkpoint) return;
    espi_saved_file_close(&checkpoint->file);
    json_decref(checkpoint->manifest);
    free(checkpoint);
}

esp_status espi_checkpoint_count(int64_t *count, const espi_checkpoint *checkpoint, const char *name, esp_dtype dtype) {
    return espi_saved_file_count(count, &checkpoint->file, name, dtype);
}

static int64_t total_of(const espi_saved_array *a) {
    return a->total ? a->total : a->count;
}

/* What the manifest says of the array; NULL: it is in the manifest's own file. */
static const json_t *listed(const espi_checkpoint *c, const espi_saved_array *a) {
    return json_object_get(json_object_get(c->manifest, "arrays"), a->name);
}

/* The pieces of `said` must be the whole of the array that is wanted. */
static esp_status check_pieces(const espi_checkpoint *c, const espi_saved_array *a, const json_t *said) {
    const char *dtype = json_string_value(json_object_get(said, "dtype"));
    const json_t *pieces = json_object_get(said, "pieces");
    const int64_t values = json_integer_value(json_object_get(said, "values"));
    int64_t covered = 0;
    for (size_t i = 0; i < json_array_size(pieces); i++) covered += json_integer_value(json_array_get(json_array_get(pieces, i), 2));
    if (!dtype || strcmp(dtype, esp_dtype_name(a->dtype)) != 0)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: array \"%s\" has another type, expected %s", c->file.path, a->name, esp_dtype_name(a->dtype));
    if (values != total_of(a) || covered != values)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: array \"%s\" has %lld values in pieces of %lld, expected %lld", c->file.path, a->name,
                         (long long)values, (long long)covered, (long long)total_of(a));
    return ESP_OK;
}

/* What `a` wants of the piece: values *from .. *to-1 of the whole array. */
static bool wanted(int64_t *from, int64_t *to, const espi_saved_array *a, const json_t *piece, size_t part) {
    const int64_t first = json_integer_value(json_array_get(piece, 1)), end = first + json_integer_value(json_array_get(piece, 2));
    const int64_t own = a->total ? a->first : 0;
    *from = first > own ? first : own;
    *to = end < own + a->count ? end : own + a->count;
    return json_integer_value(json_array_get(piece, 0)) == (json_int_t)part && *from < *to;
}

static esp_status open_part(espi_saved_file *file, const espi_checkpoint *c, size_t part) {
    const json_t *said = json_array_get(json_object_get(c->manifest, "parts"), part);
    const char *name = json_string_value(json_object_get(said, "file")), *hash = json_string_value(json_object_get(said, "checksum"));
    char path[ESPI_PATH_MAX];
    if (!name || strchr(name, '/') || !hash)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: part %zu of its manifest has no file or no checksum, expected both", c->file.path, part);
    ESPI_TRY(beside(path, c->file.path, name));
    ESPI_TRY(espi_saved_file_open(file, path));
    if (file->hash == strtoull(hash, NULL, 16) && (json_int_t)file->bytes == json_integer_value(json_object_get(said, "bytes")))
        return ESP_OK;
    return ESPI_FAIL(ESP_ERR_FORMAT, "%s: got %llu bytes with checksum %016llx, expected those that %s names: it is of another save", path,
                     (unsigned long long)file->bytes, (unsigned long long)file->hash, c->file.path);
}

/* All that is wanted of one part, which is opened when there is something. */
static esp_status read_from_part(espi_saved_file *file, const espi_checkpoint *c, size_t part, const espi_saved_array *into, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const espi_saved_array *a = &into[i];
        const json_t *pieces = json_object_get(listed(c, a), "pieces");
        for (size_t k = 0; k < json_array_size(pieces); k++) {
            const json_t *piece = json_array_get(pieces, k);
            int64_t from, to;
            if (!wanted(&from, &to, a, piece, part)) continue;
            if (file->file < 0) ESPI_TRY(open_part(file, c, part));
            const int64_t first = json_integer_value(json_array_get(piece, 1)), own = a->total ? a->first : 0;
            ESPI_TRY(espi_saved_file_read(file, (char *)a->data + (size_t)(from - own) * esp_dtype_size(a->dtype), a->name, a->dtype,
                                          from - first, to - from, json_integer_value(json_array_get(piece, 2))));
        }
    }
    return ESP_OK;
}

esp_status espi_checkpoint_read_all(const espi_checkpoint *c, const espi_saved_array *into, size_t n) {
    for (size_t i = 0; i < n; i++) {
        const espi_saved_array *a = &into[i];
        const json_t *said = listed(c, a);
        if (a->total < 0) continue;
        if (said)
            ESPI_TRY(check_pieces(c, a, said));
        else
            ESPI_TRY(espi_saved_file_read(&c->file, a->data, a->name, a->dtype, a->total ? a->first : 0, a->count, total_of(a)));
    }
    for (size_t part = 0; part < json_array_size(json_object_get(c->manifest, "parts")); part++) {
        espi_saved_file file = {.file = -1};
        const esp_status status = read_from_part(&file, c, part, into, n);
        espi_saved_file_close(&file);
        ESPI_TRY(status);
    }
    return ESP_OK;
}

esp_status espi_checkpoint_read(const espi_checkpoint *checkpoint, const espi_saved_array *into) {
    return espi_checkpoint_read_all(checkpoint, into, 1);
}
