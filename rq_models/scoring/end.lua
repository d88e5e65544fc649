-- Change the state of an attempt that is active.
--
-- KEYS  1 the run, 2 what is done of it, 3 the job that planned it, whose meta shows it, 4 rq:wip zset of the queue
-- ARGV  1 attempt, 2 the new state, 3 time now, 4 seconds to keep the run, 5 member of the wip zset that stands for who
--       says so, or '' for people; then further fields and values
-- Returns 1, or 0 if this attempt is over, or the execution is given up that says so.
local call = redis.call
local state, attempt = unpack(call('HMGET', KEYS[1], 'state', 'attempt'))
if attempt ~= ARGV[1] or (state ~= 'planning' and state ~= 'running' and state ~= 'merging') then
  return 0
end
if ARGV[5] ~= '' and not call('ZSCORE', KEYS[4], ARGV[5]) then
  return 0
end
call('HSET', KEYS[1], 'state', ARGV[2], unpack(ARGV, 6))
if ARGV[2] == 'finished' or ARGV[2] == 'failed' or ARGV[2] == 'cancelled' then
  call('HSET', KEYS[1], 'ended_at', ARGV[3])
end
call('EXPIRE', KEYS[1], ARGV[4])
call('EXPIRE', KEYS[2], ARGV[4])
if call('EXISTS', KEYS[3]) == 1 then
  local rows, failed = unpack(call('HMGET', KEYS[1], 'rows', 'failed'))
  call('HSET', KEYS[3], 'meta', cjson.encode({state = ARGV[2], rows = tonumber(rows) or 0,
    failed = tonumber(failed) or 0}))
end
return 1
