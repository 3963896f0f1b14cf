/* A reward from its description: "0.2*regex(name=format):^<b>".  And shared objects, which bring a reward of their own. */
#include "rl/reward.h"

#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct kind {
    const char *name;
    esp_status (*make)(esp_reward *reward, const espi_reward_description *d);
    const char *argument; /* what must stand behind the colon; NULL: nothing may */
} kind;

static esp_status open_exact(esp_reward *reward, const espi_reward_description *d) {
    ESPI_TRY(espi_reward_numbers(d, NULL, 0));
    return espi_reward_take(reward, d, sizeof(espi_reward_head), esp_reward_exact);
}

static esp_status open_match(esp_reward *reward, const espi_reward_description *d) {
    ESPI_TRY(espi_reward_numbers(d, NULL, 0));
    return espi_reward_take(reward, d, sizeof(espi_reward_head), esp_reward_match);
}

/* A reward of a shared object, with the object. */
typedef struct plugged {
    espi_reward_head head;
    void *object;
    const esp_reward_plugin *plugin;
    void *user; /* the plugin's */
} plugged;

static int score_plugged(void *user, const esp_reward_batch *batch, float *reward) {
    const plugged *p = user;
    return p->plugin->score(p->user, batch, reward);
}

static void close_plugged(void *user) {
    plugged *p = user;
    if (p->plugin && p->plugin->end) p->plugin->end(p->user);
    if (p->object) dlclose(p->object);
    free(p);
}

static esp_status load_plugin(plugged *p, const espi_reward_description *d) {
    /* NODELETE: a call that overran its deadline may still run when the reward is closed. */
    p->object = dlopen(d->argument, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (!p->object) return ESPI_FAIL(ESP_ERR_IO, "reward so: %s", dlerror());
    const esp_reward_plugin *plugin = dlsym(p->object, ESP_REWARD_PLUGIN_SYMBOL);
    if (!plugin)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: no symbol %s, expected an esp_reward_plugin of that name", d->argument,
                         ESP_REWARD_PLUGIN_SYMBOL);
    if (plugin->abi != ESP_REWARD_ABI)
        return ESPI_FAIL(ESP_ERR_MISMATCH, "%s: got reward ABI %u, expected %d: compile it with this version's headers", d->argument,
                         (unsigned)plugin->abi, ESP_REWARD_ABI);
    if (plugin->struct_size != sizeof *plugin || !plugin->score)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: got struct_size %u and %s score, expected %zu (sizeof(esp_reward_plugin)) and a function",
                         d->argument, (unsigned)plugin->struct_size, plugin->score ? "a" : "no", sizeof *plugin);
    const int code = plugin->begin ? plugin->begin(&p->user, d->parameters) : 0;
    if (code != 0)
        return ESPI_FAIL(ESP_ERR_CALLBACK, "%s: its begin(\"%s\") returned %d, expected 0: see its own message", d->argument, d->parameters,
                         code);
    p->plugin = plugin;
    return ESP_OK;
}

static esp_status open_plugged(esp_reward *reward, const espi_reward_description *d) {
    ESPI_TRY(espi_reward_take(reward, d, sizeof(plugged), score_plugged));
    reward->close = close_plugged;
    reward->punctual = false;
    return load_plugin(reward->user, d);
}

static const kind kinds[] = {
    {"exact", open_exact, NULL},
    {"match", open_match, NULL},
    {"partial", open_match, NULL},
    {"regex", espi_reward_open_regex, "a pattern"},
    {"number", espi_reward_open_number, NULL},
    {"json", espi_reward_open_json, "an object of keys and types"},
    {"length", espi_reward_open_length, NULL},
    {"repetition", espi_reward_open_repetition, NULL},
    {"overlong", espi_reward_open_overlong, NULL},
    {"cmd", espi_reward_open_command, "a command"},
    {"so", open_plugged, "a path"},
};

static esp_status unknown_kind(const char *got) {
    char list[256] = "";
    for (int i = 0; i < ESPI_COUNT(kinds); i++) {
        const size_t n = strlen(list);
        snprintf(list + n, sizeof list - n, "%s%s", i ? ", " : "", kinds[i].name);
    }
    return ESPI_FAIL(ESP_ERR_ARG, "reward \"%.60s\": expected one of %s", got, list);
}

esp_status espi_reward_take(esp_reward *reward, const espi_reward_description *d, size_t bytes, esp_reward_fn fn) {
    espi_reward_head *head = calloc(1, bytes);
    if (!head) return ESPI_FAIL(ESP_ERR_MEMORY, "reward \"%s\": no memory for its %zu bytes", d->name, bytes);
    snprintf(head->name, sizeof head->name, "%s", d->name);
    *reward = (esp_reward){.name = head->name, .fn = fn, .user = head, .weight = d->weight, .close = free, .punctual = true};
    return ESP_OK;
}

static esp_status unknown_key(const espi_reward_description *d, const char *got, size_t length, const espi_reward_number *numbers, int n) {
    char list[160] = "name";
    for (int i = 0; i < n; i++) {
        const size_t used = strlen(list);
        snprintf(list + used, sizeof list - used, ", %s", numbers[i].key);
    }
    return ESPI_FAIL(ESP_ERR_ARG, "reward %s: got %.*s, expected keys of %s, as KEY=VALUE", d->kind, (int)length, got, list);
}

static esp_status read_number(const espi_reward_description *d, const espi_reward_number *number, const char *text, size_t length) {
    char copy[64], *end;
    snprintf(copy, sizeof copy, "%.*s", (int)length, text);
    const double value = strtod(copy, &end);
    if (length == 0 || length >= sizeof copy || *end || !isfinite(value) || value < number->low || value > number->high ||
        (number->whole && value != floor(value)))
        return ESPI_FAIL(ESP_ERR_ARG, "reward %s: %s: got \"%s\", expected a %snumber from %g to %g", d->kind, number->key, copy,
                         number->whole ? "whole " : "", number->low, number->high);
    *number->value = value;
    return ESP_OK;
}

esp_status espi_reward_numbers(const espi_reward_description *d, const espi_reward_number *numbers, int n) {
    for (const char *p = d->parameters; *p;) {
        const size_t length = strcspn(p, ","), key = strcspn(p, "=,");
        int i = 0;
        while (i < n && (strlen(numbers[i].key) != key || memcmp(numbers[i].key, p, key) != 0)) i++;
        if (i == n || key == length) return unknown_key(d, p, length, numbers, n);
        ESPI_TRY(read_number(d, &numbers[i], p + key + 1, length - key - 1));
        p += length + (p[length] == ',');
    }
    return ESP_OK;
}

/* Takes name=VALUE out of the parameters. */
static esp_status take_name(espi_reward_description *d) {
    static const char key[] = "name=";
    const char *name = d->kind;
    size_t length = strlen(name);
    char *p = d->parameters;
    while (*p && strncmp(p, key, sizeof key - 1) != 0) {
        p += strcspn(p, ",");
        p += *p == ',';
    }
    const bool given = *p != '\0';
    if (given) {
        name = p + sizeof key - 1;
        length = strcspn(name, ",");
    }
    if (length == 0 || length >= sizeof d->name)
        return ESPI_FAIL(ESP_ERR_ARG, "reward %s: got a name of %zu bytes, expected 1 to %d", d->kind, length, ESPI_REWARD_NAME - 1);
    memcpy(d->name, name, length);
    if (strcspn(d->name, " \t\n\"\\") < length)
        return ESPI_FAIL(ESP_ERR_ARG, "reward %s: name \"%s\": expected no spaces, quotes and backslashes", d->kind, d->name);
    if (given) {
        const char *rest = name + length + (name[length] == ',');
        memmove(p, rest, strlen(rest) + 1);
        if (!*p && p > d->parameters) p[-1] = '\0'; /* the comma before it */
    }
    return ESP_OK;
}

static esp_status take_apart(espi_reward_description *d) {
    char *text = d->text, *end;
    d->parameters = text + strlen(text); /* none */
    const double weight = strtod(text, &end);
    d->weight = 1;
    if (end != text && *end == '*') {
        if (!isfinite(weight)) return ESPI_FAIL(ESP_ERR_ARG, "reward \"%.60s\": got weight %g, expected a finite number", text, weight);
        d->weight = weight;
        text = end + 1;
    }
    d->kind = text;
    text += strcspn(text, "(:");
    if (*text == '(') {
        *text++ = '\0';
        d->parameters = text;
        text += strcspn(text, ")");
        if (!*text) return ESPI_FAIL(ESP_ERR_ARG, "reward %s: its parameters have no end, expected a )", d->kind);
        *text++ = '\0';
        if (*text && *text != ':')
            return ESPI_FAIL(ESP_ERR_ARG, "reward %s: got \"%.40s\" behind the ), expected a : or nothing", d->kind, text);
    }
    if (*text == ':') {
        *text++ = '\0';
        d->argument = text;
    }
    return ESP_OK;
}

static esp_status open_described(esp_reward *reward, espi_reward_description *d) {
    ESPI_TRY(take_apart(d));
    int i = 0;
    while (i < ESPI_COUNT(kinds) && strcmp(kinds[i].name, d->kind) != 0) i++;
    if (i == ESPI_COUNT(kinds)) return unknown_kind(d->kind);
    if (kinds[i].argument && (!d->argument || !*d->argument))
        return ESPI_FAIL(ESP_ERR_ARG, "reward %s: nothing behind it, expected a : and %s", d->kind, kinds[i].argument);
    if (!kinds[i].argument && d->argument)
        return ESPI_FAIL(ESP_ERR_ARG, "reward %s: got \"%.40s\" behind the :, expected neither", d->kind, d->argument);
    ESPI_TRY(take_name(d));
    return kinds[i].make(reward, d);
}

esp_status esp_reward_open(esp_reward *reward, const char *description) {
    if (!reward || !description) return ESPI_FAIL(ESP_ERR_ARG, "esp_reward_open: reward or description is NULL, expected both");
    *reward = (esp_reward){.name = NULL};
    const size_t bytes = strlen(description) + 1;
    espi_reward_description d = {.text = malloc(bytes)};
    if (!d.text) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a reward's description of %zu bytes", bytes);
    memcpy(d.text, description, bytes);
    const esp_status status = open_described(reward, &d);
    free(d.text);
    if (status != ESP_OK) esp_reward_close(reward);
    return status;
}

void esp_reward_close(esp_reward *reward) {
    if (!reward) return;
    if (reward->close) reward->close(reward->user);
    *reward = (esp_reward){.name = NULL};
}
