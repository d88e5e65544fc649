-- Take jobs from the front of a queue: each goes straight to `started`, with all four of its execution records, in one
-- step, so that a worker killed at any instant leaves it either queued or started and never in between.
--
-- KEYS  1 queue list, 2 rq:wip zset, 3 the worker's hash, 4 the worker's set of executions, 5 rq:suspended
-- ARGV  1 how many at most, 2 RQ's key prefix, 3 worker name, 4 lease, 5 number of the first execution,
--       6 time now as RQ writes it, 7 time now in seconds, 8 seconds that the execution records live,
--       9 bytes of job data after which no more are taken
-- Returns a list of {job id, execution id, fields}: no execution id where there was no such job; false when suspended.
if redis.call('EXISTS', KEYS[5]) == 1 then
  return false
end
-- Before the first write: a script that raises in the middle leaves jobs started that nobody holds.
for key, kind in pairs({[KEYS[1]] = 'list', [KEYS[2]] = 'zset', [KEYS[3]] = 'hash', [KEYS[4]] = 'set'}) do
  local found = redis.call('TYPE', key)['ok']
  if found ~= 'none' and found ~= kind then
    return redis.error_reply('WRONGTYPE ' .. key .. ' holds a ' .. found .. ', not a ' .. kind .. '; delete it')
  end
end
local prefix, worker, lease = ARGV[2], ARGV[3], ARGV[4]
local first, now, seconds, ttl = tonumber(ARGV[5]), ARGV[6], ARGV[7], tonumber(ARGV[8])
local taken, bytes, seen = {}, 0, {}
-- What goes into the shared keys is written once, at the end.
local members, running = {}, {}
for n = 0, tonumber(ARGV[1]) - 1 do
  if bytes >= tonumber(ARGV[9]) then break end
  local id = redis.call('LPOP', KEYS[1])
  if not id then break end
  local job = prefix .. ':job:' .. id
  -- Scripts don't roll back: a key of another type must not raise here, with jobs before it already taken.
  local fields = string.find(id, '^[%w_-]+$') and redis.pcall('HGETALL', job) or {}
  if fields['err'] or #fields == 0 then
    taken[#taken + 1] = {id, '', {}}
  elseif not seen[id] then
    -- An id that stands in the queue twice is one job, and is run once.
    seen[id] = true
    local attempts = 1
    for at = 1, #fields, 2 do
      if fields[at] == 'data' then
        bytes = bytes + #fields[at + 1]
      elseif fields[at] == 'attempts' then
        attempts = 1 + (tonumber(fields[at + 1]) or 0)
      end
    end
    local execution = lease .. '-' .. (first + n)
    local composite = id .. ':' .. execution
    redis.call('HSET', job, 'status', 'started', 'started_at', now, 'last_heartbeat', now, 'worker_name', worker,
      'attempts', attempts)
    redis.call('PERSIST', job)
    local record = prefix .. ':execution:' .. composite
    redis.call('HSET', record, 'id', execution, 'job_id', id, 'created_at', seconds, 'last_heartbeat', seconds,
      'worker_name', worker)
    redis.call('EXPIRE', record, ttl)
    local executions, score = prefix .. ':executions:' .. id, tonumber(seconds) + ttl + 60
    if type(redis.pcall('ZADD', executions, score, execution)) == 'table' then
      redis.call('DEL', executions)
      redis.call('ZADD', executions, score, execution)
    end
    redis.call('EXPIRE', executions, ttl + 60)
    members[#members + 1] = math.floor(tonumber(seconds)) + ttl
    members[#members + 1] = composite
    running[#running + 1] = composite
    taken[#taken + 1] = {id, execution, fields}
  end
end
if #running > 0 then
  redis.call('ZADD', KEYS[2], unpack(members))
  redis.call('SADD', KEYS[4], unpack(running))
  redis.call('EXPIRE', KEYS[4], ttl + 60)
end
redis.call('HSET', KEYS[3], 'state', #taken > 0 and 'busy' or 'idle')
return taken
