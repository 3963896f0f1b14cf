/// Rewards: what scores the completions of a step.  A C function, one of the built-in ones, a command that speaks JSON lines, or a shared
/// object.  Several have weights and are summed, see esp_advantages().
#ifndef ESPALIER_REWARD_H
#define ESPALIER_REWARD_H

#include "espalier/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/// One batch of completions to be scored.  Row p*group_size + g is sample g of prompt p.
typedef struct esp_reward_batch {
    size_t struct_size;
    int64_t n, group_size;
    const char *const *prompt, *const *completion; ///< text, NUL-terminated; the completion without its end token.  Any other special
                                                   ///< token shows as its text, an id without one as U+FFFD
    const char *const *answer;                     ///< the task line's "answer"
    const int32_t *const *completion_ids;
    const int32_t *completion_length;
    const uint8_t *stopped; ///< 1 = the completion ended with the end token
    int64_t step;
    const int32_t *const *prompt_ids;                          ///< NULL where the caller has none
    const int32_t *prompt_length;                              ///< the same
    int32_t max_completion;                                    ///< tokens that a completion may have; 0 = not known
    double seconds_left;                                       ///< until the deadline of this batch, at the call; infinite = none; a
                                                               ///< function called by hand may find 0 here and takes it as none
    void (*log)(void *log_to, const char *name, double value); ///< see esp_reward_log
    void (*explain)(void *log_to, const char *why);            ///< see esp_reward_fail
    void *log_to;
} esp_reward_batch;

/// reward [out] [n]; NaN = not scorable: the row leaves mean and deviation and has advantage 0; rows that are not written are NaN.
/// A non-zero return stops the run with ESP_ERR_CALLBACK (names the function and the value).
typedef int (*esp_reward_fn)(void *user, const esp_reward_batch *batch, float *reward);

/// A number beside the reward.  The mean over a step's calls stands in metrics.jsonl as "rewards/<reward>/<name>"; values that are not
/// finite, and the names "mean" and "std", are left out.  To be called from inside a reward function, on its thread.
static inline void esp_reward_log(const esp_reward_batch *batch, const char *name, double value) {
    if (batch->log) batch->log(batch->log_to, name, value);
}

/// For a reward function that cannot go on: `return esp_reward_fail(batch, "why");`.
static inline int esp_reward_fail(const esp_reward_batch *batch, const char *why) {
    if (batch->explain) batch->explain(batch->log_to, why);
    return 1;
}

/// Built in: 1 if the completion is the answer followed by the end token, else 0.
ESP_API int esp_reward_exact(void *user, const esp_reward_batch *batch, float *reward);
/// Built in: share of the answer's characters that stand at their place.
ESP_API int esp_reward_match(void *user, const esp_reward_batch *batch, float *reward);

typedef struct esp_reward {
    const char *name;
    esp_reward_fn fn;
    void *user;
    double weight;
    void (*close)(void *user); ///< set by esp_reward_open, used by esp_reward_close; NULL = nothing to release
    bool punctual;             ///< fn keeps to batch->seconds_left.  Others run on a thread of their own when the trainer has a deadline:
                               ///< one that overruns it gives NaN, is counted ("rewards/<name>/timeouts"), and is not called again before
                               ///< it returned; `user` must then outlive that call, even when the trainer is gone
} esp_reward;

/// A reward from its description, [WEIGHT*]KIND[(KEY=VALUE,..)][:ARGUMENT], such as "exact", "0.2*match", "length(target=20,width=10)",
/// "0.5*regex(name=format):^<b>.*</b>$", "cmd(children=4,deadline=30):python3 score.py".  Every kind takes name= (default: the kind).
///   exact, match       as above; `partial` is another name of match
///   regex:PATTERN      PCRE2 on UTF-8: 1 if it matches somewhere; with a group called "answer", 1 if that group is the answer
///   number             the number behind the last "answer is", "####" or "\boxed{" equals that of the answer: 1, else 0; NaN when the
///                      answer has none.  tolerance=0, anywhere=0 (1: the completion's last number will do)
///   json:{"key":"type"}  the completion is a JSON object with these keys: (1 + keys that fit) / (1 + keys), 0 if it is none.  Types:
///                      string number integer boolean array object null any; a key that ends in ? may be absent.  A ```fence is taken off
///   length             1 at target=N tokens, falling to 0 at width=N (default: the target) away from it
///   repetition         -max (1) times the share of n=3 tokens in a row that were there before
///   overlong           0 up to max - buffer tokens, falling to -1 at max (2503.14476); buffer=N, max=N (default: the run's limit)
///   cmd:COMMAND        a child process, see below; children=1, deadline=60 (seconds for a batch)
///   so:PATH            a shared object, see esp_reward_plugin; other keys go to its begin()
/// reward [out] esp_reward_close() it.  ESP_ERR_ARG: the sentence names what is wrong and the known kinds or keys.
///
/// cmd: the shell runs COMMAND in a process group of its own when the first batch comes.  It gets one JSON object a line on its standard
/// input, {"id","step","group","prompt","completion","answer","prompt_ids","completion_ids","stopped","index","count"}: count lines of this
/// batch come to this child, this is number index.  For each it writes one line {"reward": number or null} to its standard output and
/// flushes; other numbers in it are logged as by esp_reward_log; with "id" replies may come in any order.  Standard error is passed through.
/// What is not answered at the deadline is NaN, and the child is killed with its whole group and started anew; a line that is no such object
/// is NaN and puts those behind it in doubt (they count only by their id); a child that ends is started anew for the lines it has not got to.
/// metrics.jsonl counts "timeouts", "restarts" and "bad_replies".  A child that ends before its first answer ever fails the call.
ESP_API esp_status esp_reward_open(esp_reward *reward, const char *description);
/// Releases what esp_reward_open made and zeroes it; NULL and a reward made by hand are allowed.
ESP_API void esp_reward_close(esp_reward *reward);

/// What a shared object for so:PATH exports, under the name "esp_reward_plugin_v1":
///     const esp_reward_plugin esp_reward_plugin_v1 = {.abi = ESP_REWARD_ABI, .score = mine};
#define ESP_REWARD_ABI 1
#define ESP_REWARD_PLUGIN_SYMBOL "esp_reward_plugin_v1"
typedef struct esp_reward_plugin {
    uint32_t abi;                                      ///< ESP_REWARD_ABI of the header it was compiled with; another one is refused
    uint32_t struct_size;                              ///< sizeof(esp_reward_plugin)
    int (*begin)(void **user, const char *parameters); ///< "key=value,..", "" without any; non-zero = failed; NULL = user is NULL
    esp_reward_fn score;                               ///< required
    void (*end)(void *user);                           ///< NULL = nothing to release
} esp_reward_plugin;

#ifdef __cplusplus
}
#endif
#endif
