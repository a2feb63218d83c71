"""The commands' help."""

from __future__ import annotations

from gpuckpt.cli.helping import page

_MANIFESTS = "the root's manifests, and no tensor's bytes"

LS = page(
    "List a root's committed steps: age, size, ratio, epoch, metrics.",
    """
    Where steps refer to older files, `in older` is how many of their bytes lie there, and `back
    to` the step of the oldest; `deltas` and `derived` are the shares of the tensors that are
    saved as what they differ by, or as other tensors' numbers, rounded. With --keep, `kept` says
    which steps `gpuckpt prune` would keep.
    """,
    _MANIFESTS,
    "nothing",
    {0: "all is well", 1: "a manifest is damaged"},
    ["gpuckpt ls runs/a", "gpuckpt ls s3://bucket/runs/a --keep last=2,best=loss:min:3"],
)

SHOW = page(
    "Show a checkpoint's tensors and values, norms and NaNs.",
    """
    `version` is the step at which a tensor's bytes last changed. Norms and the numbers of NaNs
    and infinities are those that the save counted; --compute reads the tensors and counts anew,
    with the smallest and largest number, the mean, and the share of zeros. --tree sums up what
    is below each name; --depth 2 shows two levels of it.
    """,
    "one step's manifest; with --compute, its tensors",
    "nothing",
    {0: "all is well"},
    [
        "gpuckpt show runs/a",
        "gpuckpt show runs/a --step 700 --names 'model.*' --json",
        "gpuckpt show runs/a --tree --depth 2 --compute",
    ],
)

DIFF = page(
    "Say which tensors moved between two checkpoints, and how far.",
    """
    A and B are roots, of which the newest step is meant, or ROOT@STEP. With A alone, the step is
    compared with the one before it; --steps names two steps of A.

    `changed` is the share of a tensor's numbers with other bits, in percent, and so are `sign`,
    `exp` and `mant` for the parts of floats, and `bytes` for each byte from the highest down.
    `largest` is the largest absolute difference, `relative` the norm of the difference for each
    of the norm before, `cosine` that of the angle between the two. What is equal by its
    fingerprints isn't read, and of the rest only chunks that differ. Without --all, the 40
    tensors that moved most are shown.
    """,
    "both manifests, and of tensors that aren't equal the chunks that differ",
    "nothing",
    {0: "done; with --exit-code, they are equal", 1: "with --exit-code: they differ"},
    [
        "gpuckpt diff runs/a",
        "gpuckpt diff runs/a --steps 100 200 --names 'model.*'",
        "gpuckpt diff runs/a@100 s3://bucket/runs/b@100 --exit-code --json",
    ],
)

PRUNE = page(
    "Delete the steps that a rule doesn't keep; --dry-run only looks.",
    """
    --keep is what a Checkpointer's `keep` is: last=2 the two newest, every=1000 the steps that
    1000 divides, best=loss:min:3 the three with the smallest metric, newer_than=2h; steps that
    any of them keeps stay, and always the newest. Data that a kept step refers to stays, whatever
    step wrote it, and is counted once. Files that no checkpoint names, which a crash leaves, go
    too.

    It holds the root's lock, so a run that has the root stops it; --dry-run looks without it.
    """,
    "the root's manifests",
    "deletes manifests, and then the data that none names; with --dry-run, nothing",
    {0: "all is well"},
    [
        "gpuckpt prune runs/a --keep last=2,every=1000 --dry-run",
        "gpuckpt prune runs/a --keep last=2,best=loss:min:3,newer_than=2h",
    ],
)

VERIFY = page(
    "Read and check every byte, and name what is damaged, and where.",
    "With --key-file, what isn't sealed with that key is damage, too.",
    "every byte of the steps' files",
    "nothing",
    {0: "all is intact", 1: "there is damage"},
    ["gpuckpt verify runs/a", "gpuckpt verify runs/a --step 700 --json"],
)

REPAIR = page(
    "Salvage what is intact of a damaged checkpoint.",
    "What is intact becomes a checkpoint of another directory, and is verified there.",
    "one step's files, and those of other steps that may have the same bytes",
    "writes a checkpoint to the directory --to; ROOT isn't changed",
    {0: "nothing is lost", 1: "something is lost"},
    ["gpuckpt repair runs/a --step 700 --to runs/saved", "gpuckpt repair runs/a --to s --fill"],
)

MERGE = page(
    "Put ranks' own directories together into one checkpoint.",
    "For ranks that shared no file system: each has its own files of a step in its own root.",
    "the files of one step in each of ROOTS, checking every byte",
    "writes a checkpoint to the directory --to; ROOTS aren't changed",
    {0: "all is well"},
    ["gpuckpt merge node0/run node1/run --to runs/whole --step 700"],
)

CONVERT = page(
    "Convert between gpuckpt's and other libraries' formats.",
    """
    Formats are known by what is there, and a target's by its name or by --to: safetensors (also
    in shards), npz, torch, dcp, orbax, SINGA's and Paddle Fluid's, and gpuckpt's roots. It says
    what the target's format has no room for; --strict refuses to lose that. Bytes are compared
    with the source's check values where it has any, and each tensor's checksum goes along with
    the target; --verify reads the target back as well.
    """,
    "SOURCE: one step of a root, or all of a file or directory",
    "writes TARGET, as a whole or not at all; what is there only with --force",
    {0: "all is well"},
    [
        "gpuckpt convert runs/a model.safetensors --names 'model.*'",
        "gpuckpt convert model.pt runs/b --step 0 --verify",
        "gpuckpt convert runs/a step400-worker0.bin --to singa --step 400",
        "gpuckpt convert runs/a for-singa --to singa --workers 4 --axis ip1_weight=1",
    ],
)

TRACE = page(
    "Write the stages of saves as a trace for Perfetto or Chrome.",
    "A Checkpointer keeps that with log=True, or a path, and trace=True.",
    "a log of saves: a file, or that of a root",
    "writes the file --out",
    {0: "all is well"},
    ["gpuckpt trace runs/c --out trace.json"],
)

REPORT = page(
    "Write one HTML page about a run's saves.",
    """
    Times, bytes, the timeline of a save (of a Checkpointer with trace=True), norms by layer, what
    is kept and why. The page has no scripts and asks no network. With --json its data are
    printed, and the page is written only with --out.
    """,
    "the root's manifests and its log of saves, and no tensor's bytes",
    "writes the file --out (report.html)",
    {0: "all is well"},
    ["gpuckpt report runs/a", "gpuckpt report runs/a --keep last=3,every=1000 --out a.html"],
)

WHY_SLOW = page(
    "Name the bottleneck of the last save, and show its figures.",
    """
    Figures are seconds. `stall`: the loop was blocked; `slower`: its steps beside the save took
    longer; `work`: of all workers; `off-cpu`: of that they had no CPU; `disk`: writing and
    committing. A Checkpointer keeps them with log=True, or a path.
    """,
    "a log of saves: a file, or that of a root",
    "nothing",
    {0: "all is well"},
    ["gpuckpt why-slow runs/c", "gpuckpt why-slow /var/log/saves.jsonl --last 3 --json"],
)

SELFTEST = page(
    "See whether a file system keeps what checkpoints rely on.",
    "Renames, syncs, locks, direct writes, kills in the middle of saves, flipped bits, speed. "
    "A minute or less.",
    "what it writes there itself",
    "makes a directory there, and removes it unless a check failed",
    {0: "checkpoints are safe there as far as can be seen", 1: "a check failed"},
    ["gpuckpt selftest /data", "gpuckpt selftest /mnt/nfs --size '1 GiB' --json"],
)

BENCH = page(
    "Measure this machine's limits, and the save interval they allow.",
    """
    First the limits: copying memory, writing to this disk past the page cache and syncing,
    reading that back, coding on one core, and, where there is a GPU, its bus. Then saves of a
    state of --size, as a Checkpointer does them, beside a loop that takes every core and beside
    one that waits. The interval is the shortest that keeps what a save costs the loop under
    --overhead of the time.
    """,
    "what it writes there itself",
    "makes a directory there for three times --size, and removes it",
    {0: "all is well"},
    ["gpuckpt bench /data", "gpuckpt bench /data --size '4 GiB' --overhead 0.005 --json"],
)

WATCH = page(
    "Watch a run's saves as they come, until Ctrl-C.",
    """
    The last saves with what they cost and their bottleneck, when the next is due by the
    pace so far, and what is left of the disk. All figures are there if the run's
    Checkpointer has log=True; of others, what manifests say. Ranks with logs of their own are
    shown together.
    """,
    "a root's list of files, its newest manifests, and its logs, every --every seconds",
    "nothing",
    {0: "all is well"},
    ["gpuckpt watch runs/a", "gpuckpt watch runs/a --once --json"],
)

DEMO = page(
    "Train a small model, kill it in mid-save, resume, and compare.",
    "",
    "nothing of yours",
    "writes checkpoints to DIRECTORY, or to a temporary one that goes away",
    {0: "the runs are equal", 1: "they differ"},
    ["gpuckpt demo", "gpuckpt demo runs/demo --steps 300 --every 20 --json"],
)
