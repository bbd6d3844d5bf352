/* A storm of hard links: what `nodetool snapshot` and incremental backups do to a data directory, at C speed.
 *
 *     storm seed      ROOT TABLES COMPONENTS        make the live SSTables
 *     storm snapshot  ROOT TABLES COMPONENTS TAG    per table: link all, then manifest.json, then schema.cql
 *     storm backups   ROOT TABLES COMPONENTS        link all into each table's backups/
 *     storm clear     ROOT TAG                      remove every table's snapshots/TAG
 *
 *     -i N   each table has N indexes: .idx1, .idx2 ... with one SSTable each       (default 0)
 *     -b N   bytes in each component but TOC.txt and Digest.crc32                    (default 0)
 *     -g N   number of the first SSTable                                             (default 1)
 *     -r N   at most N links a second                                                (default 0: no limit)
 *     -c MS  clear: wait first. snapshot: clear the tag so long after the last link  (default: never)
 *     -e     with -c: clear each table's tag so long after that table is done
 *     -t T   created_at in the manifests
 *
 * COMPONENTS is a multiple of 8. Prints "links=... files=... seconds=...". storm.py runs this, and does the
 * same in Python, byte for byte, where there is no C compiler.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <glob.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define KEYSPACE "storm"
#define PER_SSTABLE 8

static const char *const components[PER_SSTABLE] = {
    "Data.db",  "TOC.txt",    "Digest.crc32", "Statistics.db",
    "Index.db", "Summary.db", "Filter.db",    "CompressionInfo.db",
};

static const char *root;
static int tables, sstables, indexes, bytes, first = 1, rate, clear_ms = -1, clear_each;
static const char *created_at = "2026-01-01T00:00:00.000Z";
static long links, files;
static double started;

static void die(const char *what, const char *path)
{
    fprintf(stderr, "storm: %s %s: %s\n", what, path, strerror(errno));
    exit(1);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void pause_for(double seconds)
{
    struct timespec t = {(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)};
    if (seconds > 0)
        nanosleep(&t, NULL);
}

static int make_and_open(int parent, const char *name)
{
    if (mkdirat(parent, name, 0755) && errno != EEXIST)
        die("mkdir", name);
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        die("open", name);
    return fd;
}

static void write_file(int folder, const char *name, const char *text, size_t size)
{
    int fd = openat(folder, name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0 || write(fd, text, size) != (ssize_t)size || close(fd))
        die("write", name);
    files++;
}

static uint32_t crc32(const char *text, size_t size)
{
    uint32_t crc = ~0u;
    for (size_t i = 0; i < size; i++) {
        crc ^= (unsigned char)text[i];
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
    }
    return ~crc;
}

static int open_table(int number)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/" KEYSPACE, root);
    int keyspace = make_and_open(AT_FDCWD, path);
    snprintf(path, sizeof path, "t%05d-%032x", number, number);
    int table = make_and_open(keyspace, path);
    close(keyspace);
    return table;
}

/* The name of a family's directory, relative to the table's: the table itself is family 0. */
static const char *family_name(int family)
{
    static char name[32];
    if (!family)
        return ".";
    snprintf(name, sizeof name, ".idx%d", family);
    return name;
}

static int count_of(int family)
{
    return family ? 1 : sstables;
}

static void seed_sstable(int folder, int table, int family, int generation)
{
    char name[64], toc[256] = "", *text = malloc(bytes + 1);
    uint32_t digest = 0;
    for (int c = 0; c < PER_SSTABLE; c++)
        strcat(strcat(toc, components[c]), "\n");
    for (int c = 0; c < PER_SSTABLE; c++) {
        char line[128];
        int size = snprintf(line, sizeof line, "%d %d %d %s\n", table, family, generation, components[c]);
        for (int i = 0; i < bytes; i++)
            text[i] = line[i % size];
        if (c == 0)
            digest = crc32(text, bytes);
        snprintf(name, sizeof name, "nb-%d-big-%s", generation, components[c]);
        if (!strcmp(components[c], "TOC.txt"))
            write_file(folder, name, toc, strlen(toc));
        else if (!strcmp(components[c], "Digest.crc32"))
            write_file(folder, name, line, snprintf(line, sizeof line, "%u", digest));
        else
            write_file(folder, name, text, bytes);
    }
    free(text);
}

static void seed(int number)
{
    int table = open_table(number);
    for (int family = 0; family <= indexes; family++) {
        int folder = make_and_open(table, family_name(family));
        for (int n = 0; n < count_of(family); n++)
            seed_sstable(folder, number, family, first + n);
        close(folder);
    }
    close(table);
}

static void link_one(int from, int to, const char *name)
{
    if (linkat(from, name, to, name, 0))
        die("link", name);
    links++;
    if (rate)
        pause_for(started + (double)links / rate - now());
}

/* Link every component of a table, indexes included, into the same places below `target`. */
static void link_table(int table, int target)
{
    char name[64];
    for (int family = 0; family <= indexes; family++) {
        int from = make_and_open(table, family_name(family)), to = make_and_open(target, family_name(family));
        for (int n = 0; n < count_of(family); n++)
            for (int c = 0; c < PER_SSTABLE; c++) {
                snprintf(name, sizeof name, "nb-%d-big-%s", first + n, components[c]);
                link_one(from, to, name);
            }
        close(from);
        close(to);
    }
}

static void write_manifest(int folder)
{
    char *text, *comma = "";
    size_t size;
    FILE *out = open_memstream(&text, &size);
    fputs("{\"files\":[", out);
    for (int family = 0; family <= indexes; family++)
        for (int n = 0; n < count_of(family); n++, comma = ",") {
            const char *name = family ? family_name(family) : "";
            fprintf(out, "%s\"%s%snb-%d-big-Data.db\"", comma, name, family ? "/" : "", first + n);
        }
    fprintf(out, "],\"created_at\":\"%s\",\"expires_at\":null,\"ephemeral\":false}", created_at);
    fclose(out);
    write_file(folder, "manifest.json", text, size);
    free(text);
}

static void write_schema(int folder, int number)
{
    char text[256];
    int size = snprintf(text, sizeof text,
                        "CREATE TABLE IF NOT EXISTS " KEYSPACE ".t%05d (key text PRIMARY KEY, value blob) "
                        "WITH ID = 00000000-0000-0000-0000-%012x;\n", number, number);
    write_file(folder, "schema.cql", text, size);
}

static int remove_one(const char *path, const struct stat *info, int kind, struct FTW *where)
{
    (void)info, (void)kind, (void)where;
    if (remove(path) && errno != ENOENT)
        die("remove", path);
    return 0;
}

static void clear(const char *tag, const char *table)
{
    char pattern[PATH_MAX];
    glob_t found;
    snprintf(pattern, sizeof pattern, "%s/*/%s/snapshots/%s", root, table, tag);
    if (glob(pattern, GLOB_NOSORT, NULL, &found) == 0)
        for (size_t i = 0; i < found.gl_pathc; i++)
            nftw(found.gl_pathv[i], remove_one, 16, FTW_DEPTH | FTW_PHYS);
    globfree(&found);
}

static void snapshot(int number, const char *tag)
{
    int table = open_table(number), parent = make_and_open(table, "snapshots");
    int target = make_and_open(parent, tag);
    link_table(table, target);
    write_manifest(target);
    write_schema(target, number);
    close(target);
    close(parent);
    close(table);
    if (clear_each) {
        char name[64];
        snprintf(name, sizeof name, "t%05d-*", number);
        pause_for(clear_ms / 1000.0);
        clear(tag, name);
    }
}

static void backups(int number)
{
    int table = open_table(number), target = make_and_open(table, "backups");
    link_table(table, target);
    close(target);
    close(table);
}

static void usage(void)
{
    fputs("usage: storm seed|snapshot|backups ROOT TABLES COMPONENTS [TAG] | storm clear ROOT TAG\n"
          "             [-i INDEXES] [-b BYTES] [-g FIRST] [-r RATE] [-c MS [-e]] [-t CREATED_AT]\n", stderr);
    exit(2);
}

static void read_options(int argc, char **argv)
{
    for (int option; (option = getopt(argc, argv, "i:b:g:r:c:et:")) != -1;)
        switch (option) {
        case 'i': indexes = atoi(optarg); break;
        case 'b': bytes = atoi(optarg); break;
        case 'g': first = atoi(optarg); break;
        case 'r': rate = atoi(optarg); break;
        case 'c': clear_ms = atoi(optarg); break;
        case 'e': clear_each = 1; break;
        case 't': created_at = optarg; break;
        default: usage();
        }
}

int main(int argc, char **argv)
{
    read_options(argc, argv);
    int given = argc - optind;
    const char *command = given ? argv[optind] : "", *tag = given ? argv[argc - 1] : "";
    int is_clear = !strcmp(command, "clear"), is_snapshot = !strcmp(command, "snapshot");
    int is_seed = !strcmp(command, "seed"), is_backups = !strcmp(command, "backups");
    if (given != (is_clear ? 3 : is_snapshot ? 5 : is_seed || is_backups ? 4 : -1))
        usage();
    root = argv[optind + 1];
    tables = is_clear ? 0 : atoi(argv[optind + 2]);
    sstables = is_clear ? 0 : atoi(argv[optind + 3]) / PER_SSTABLE;
    started = now();
    for (int number = 1; number <= tables; number++)
        is_seed ? seed(number) : is_backups ? backups(number) : snapshot(number, tag);
    double seconds = now() - started;
    if (is_clear || (is_snapshot && clear_ms >= 0 && !clear_each)) {
        pause_for(clear_ms / 1000.0);
        clear(tag, "*");
    }
    printf("links=%ld files=%ld seconds=%.6f\n", links, files, seconds);
    return 0;
}
