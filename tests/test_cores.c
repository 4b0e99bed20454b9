/* The default number of threads: one per core that the process may use, but not more than its control groups allow. The
   tests use invented trees of files, this process's CPU mask, and a real control group if one can be made. */
#define _GNU_SOURCE
#include "tests/check.h"
#define LLM_IMPLEMENTATION
#define LLM_NO_SIMD /* nothing is computed here */
#include "llm.h"

#include <sys/wait.h>

static char root[] = "/tmp/llm-cores-XXXXXX";

static void put(const char *path, const char *text) {
    char whole[512];
    snprintf(whole, sizeof whole, "%s%s", root, path);
    for (char *slash = whole + strlen(root); (slash = strchr(slash + 1, '/'));) {
        *slash = 0;
        mkdir(whole, 0700);
        *slash = '/';
    }
    FILE *f = fopen(whole, "w");
    assert_non_null(f);
    fputs(text, f);
    assert_int_equal(fclose(f), 0);
}

static void put_cpu(int cpu, int package, int core) {
    char path[128], text[16];
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/core_id", cpu);
    snprintf(text, sizeof text, "%d\n", core);
    put(path, text);
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/physical_package_id", cpu);
    snprintf(text, sizeof text, "%d\n", package);
    put(path, text);
}

static int begin(void **state) {
    (void)state;
    strcpy(root + strlen(root) - 6, "XXXXXX");
    return mkdtemp(root) ? 0 : -1;
}

static int end(void **state) {
    char command[64];
    (void)state;
    snprintf(command, sizeof command, "rm -r %s", root);
    return system(command);
}

/* Counts cores with processors [from, to) allowed. */
static int count(int from, int to) {
    uint8_t allowed[LLM__MOST_CPUS] = {0};
    for (int i = from; i < to; i++) allowed[i] = 1;
    return llm__cores_count(root, allowed);
}

/* Two packages of four cores with two hardware threads each. Processors 0 to 7 are the cores' first threads, 8 to 15
   their second ones. */
static void test_hardware_threads(void **state) {
    (void)state;
    for (int cpu = 0; cpu < 16; cpu++) put_cpu(cpu, cpu / 4 % 2, cpu % 4);
    assert_int_equal(count(0, 16), 8);
    assert_int_equal(count(0, 8), 8); /* one hardware thread of each core */
    assert_int_equal(count(8, 16), 8);
    assert_int_equal(count(0, 4), 4);
    assert_int_equal(count(4, 12), 8);
    assert_int_equal(count(5, 6), 1);
}

/* Eight large cores with two hardware threads each (adjacent numbers), then eight small cores with one. */
static void test_hybrid(void **state) {
    (void)state;
    for (int cpu = 0; cpu < 24; cpu++) put_cpu(cpu, 0, cpu < 16 ? cpu / 2 * 4 : 16 + cpu);
    assert_int_equal(count(0, 24), 16);
    assert_int_equal(count(0, 16), 8);
    assert_int_equal(count(14, 18), 3);
}

/* Without information about cores, each processor counts as a core. */
static void test_unknown_cores(void **state) {
    (void)state;
    assert_int_equal(count(0, 6), 6);
    put_cpu(0, -1, -1);
    put_cpu(1, -1, -1);
    assert_int_equal(count(0, 6), 6);
}

static void test_version_2(void **state) {
    (void)state;
    put("/proc/self/cgroup", "0::/a/b/c\n");
    assert_int_equal(count(0, 64), 64);
    put("/sys/fs/cgroup/a/b/c/cpu.max", "max 100000\n");
    assert_int_equal(count(0, 64), 64);
    put("/sys/fs/cgroup/a/cpu.max", "800000 100000\n"); /* the limit of a parent group */
    assert_int_equal(count(0, 64), 8);
    put("/sys/fs/cgroup/a/b/c/cpu.max", "250000 100000\n"); /* 2.5 processors: a third thread would often wait */
    assert_int_equal(count(0, 64), 2);
    put("/sys/fs/cgroup/a/b/c/cpu.max", "20000 100000\n");
    assert_int_equal(count(0, 64), 1);
    assert_int_equal(count(3, 4), 1);
    put("/sys/fs/cgroup/a/b/c/cpu.max", "nonsense\n");
    assert_int_equal(count(0, 64), 8);
}

/* In a container the group is the root of the mount, whatever its name outside. */
static void test_container(void **state) {
    (void)state;
    put("/proc/self/cgroup", "0::/../../outside\n");
    put("/sys/fs/cgroup/cpu.max", "200000 100000\n");
    assert_int_equal(count(0, 64), 2);
    put("/proc/self/cgroup", "0::/\n");
    assert_int_equal(count(0, 64), 2);
}

static void test_version_1(void **state) {
    (void)state;
    put("/proc/self/cgroup", "9:memory:/x\n4:cpu,cpuacct:/docker/1\n1:name=systemd:/y\n");
    put("/sys/fs/cgroup/cpu/docker/1/cpu.cfs_quota_us", "-1\n");
    put("/sys/fs/cgroup/cpu/docker/1/cpu.cfs_period_us", "100000\n");
    assert_int_equal(count(0, 64), 64);
    put("/sys/fs/cgroup/cpu/docker/1/cpu.cfs_quota_us", "300000\n");
    assert_int_equal(count(0, 64), 3);
}

/* Programs that the host starts do not inherit the files that the library has open. */
static void test_not_inherited(void **state) {
    (void)state;
    int fd = llm__file_descriptor("/proc/self/status");
    assert_true(fd >= 0);
    assert_true(fcntl(fd, F_GETFD) & FD_CLOEXEC);
    close(fd);
    assert_int_equal(llm__file_descriptor("/proc/self/absent"), -1);
}

/* Uses this machine's files. A child is limited to one processor, as with taskset. */
static void test_mask(void **state) {
    cpu_set_t all, one;
    int status, first = 0;
    (void)state;
    assert_in_range(llm__team_default_threads(), 1, 256);
    assert_int_equal(sched_getaffinity(0, sizeof all, &all), 0);
    while (!CPU_ISSET(first, &all)) first++;
    CPU_ZERO(&one);
    CPU_SET(first, &one);
    pid_t child = fork();
    if (!child) _exit(sched_setaffinity(0, sizeof one, &one) ? 100 : llm__team_default_threads());
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(WEXITSTATUS(status), 1);
}

/* A control group (version 2 or 1) is limited to the time of one processor. Only root can make one, and not in every
   container. */
static void test_group(void **state) {
    static const char *const makes[] = {
        "g=/sys/fs/cgroup/llm-test-cores && mkdir $g && test -e $g/cgroup.procs && echo '100000 100000' >$g/cpu.max",
        "g=/sys/fs/cgroup/cpu/llm-test-cores && mkdir $g && test -e $g/cgroup.procs && echo 100000 "
        ">$g/cpu.cfs_period_us && echo 100000 >$g/cpu.cfs_quota_us"};
    static const char *const groups[] = {"/sys/fs/cgroup/llm-test-cores", "/sys/fs/cgroup/cpu/llm-test-cores"};
    char command[1024], self[256];
    (void)state;
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    assert_true(n > 0);
    self[n] = 0;
    if (llm__team_default_threads() < 2) {
        print_message("skipped: this machine has one core, so a limit of one core would not matter\n");
        skip();
    }
    for (int i = 0; i < 2; i++) {
        snprintf(command, sizeof command, "exec 2>/dev/null; %s && echo 0 >$g/cgroup.procs && exec '%s' --count",
                 makes[i], self);
        int status = system(command);
        rmdir(groups[i]);
        if (WEXITSTATUS(status) < 10 || WEXITSTATUS(status) > 99) continue; /* the group could not be made */
        print_message("in %s: %d\n", groups[i], WEXITSTATUS(status) - 10);
        assert_int_equal(WEXITSTATUS(status), 11);
        return;
    }
    print_message("skipped: this process may not make a control group\n");
    skip();
}

int main(int argc, char **argv) {
    if (argc == 2 && !strcmp(argv[1], "--count")) return 10 + llm__team_default_threads();
    const struct CMUnitTest tests[] = {cmocka_unit_test_setup_teardown(test_hardware_threads, begin, end),
                                       cmocka_unit_test_setup_teardown(test_hybrid, begin, end),
                                       cmocka_unit_test_setup_teardown(test_unknown_cores, begin, end),
                                       cmocka_unit_test_setup_teardown(test_version_2, begin, end),
                                       cmocka_unit_test_setup_teardown(test_container, begin, end),
                                       cmocka_unit_test_setup_teardown(test_version_1, begin, end),
                                       cmocka_unit_test(test_not_inherited),
                                       cmocka_unit_test(test_mask),
                                       cmocka_unit_test(test_group)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
