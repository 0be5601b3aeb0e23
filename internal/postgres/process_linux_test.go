package postgres

import (
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// Most users aren't root.
func TestAsOrdinaryUser(t *testing.T) {
	if os.Geteuid() != 0 {
		return // then every other test shows it
	}
	u, err := user.Lookup("nobody")
	if err != nil {
		t.Fatal(err)
	}
	uid, _ := strconv.Atoi(u.Uid)
	gid, _ := strconv.Atoi(u.Gid)
	// Both the test binary and the data dir must be where nobody can go.
	dir, err := os.MkdirTemp("", "postgres-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chown(dir, uid, gid); err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(dir, "owner")
	in, err := os.Open(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(binary, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	data := filepath.Join(dir, "data")
	address, _ := startOwner(t, binary, data, func(cmd *exec.Cmd) {
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	})
	if got := mustQuery(t, address, "show data_directory"); got != filepath.Join(data, clusterName) {
		t.Errorf("data directory %q", got)
	}
}

func TestKeepClusterAway(t *testing.T) {
	for _, c := range []struct{ name, before, after string }{
		{"the default", "# a\n#create_main_cluster = true\n#start_conf = 'auto'\n", "# a\ncreate_main_cluster = false\n#start_conf = 'auto'\n"},
		{"someone's choice", "create_main_cluster = true\n", "create_main_cluster = true\n"},
		{"a spaced default", "#  create_main_cluster=true", "create_main_cluster = false"},
	} {
		t.Run(c.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "createcluster.conf")
			if err := os.WriteFile(file, []byte(c.before), 0o644); err != nil {
				t.Fatal(err)
			}
			if err := keepClusterAway(file); err != nil {
				t.Fatal(err)
			}
			got, err := os.ReadFile(file)
			if err != nil || string(got) != c.after {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
	if err := keepClusterAway(filepath.Join(t.TempDir(), "absent")); err != nil {
		t.Error(err)
	}
}

func TestServerAccount(t *testing.T) {
	if os.Geteuid() != 0 {
		return // only root has a choice
	}
	a, err := serverAccount(filepath.Join(t.TempDir(), "none"))
	if err != nil || a == nil || a.uid == 0 {
		t.Fatalf("account %+v, %v", a, err)
	}
	nobody := &account{name: "nobody", uid: 65534, gid: 65534}
	dir := t.TempDir()
	if err := nobody.own(dir); err != nil {
		t.Fatal(err)
	}
	if a, err = serverAccount(dir); err != nil || a.uid != nobody.uid {
		t.Errorf("the owner of a cluster must keep it: %+v, %v", a, err)
	}
	if err := os.Chown(dir, 54321, 54321); err != nil {
		t.Fatal(err)
	}
	if _, err = serverAccount(dir); err == nil || !strings.Contains(err.Error(), "54321") {
		t.Errorf("an owner who isn't in passwd: %v", err)
	}
}
